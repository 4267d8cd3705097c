// The timeline of planner/timeline.py, for the search: the same rules, event by event, without spans.
//
// A plan is played once; its state is kept at every unit's readiness. What one replaced unit changes comes after its own
// readiness, so a trial starts there. It stops early where it provably cannot get below the limit, and where nothing is under
// way in either timeline at the same unit's readiness: from there on both are the same but for a shift.
//
// Times are seconds from the start of backward. Compiled without contraction or fast-math: results equal Python's to the bit
// but for that shift.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "timeline_menu.h"
#include "timeline_plan.h"

extern "C" {

void* espresso_menu_new(double element_bytes, int curves, const int32_t* points, const double* x, const double* y,
                        const double* slopes, int operations, const int32_t* fields, int choices, const int16_t* steps,
                        const int8_t* counts) {
    return new Menu(element_bytes, curves, points, x, y, slopes, operations, fields, choices, steps, counts);
}

void espresso_menu_free(void* menu) { delete static_cast<Menu*>(menu); }

// Seconds of every operation for units of `numel` elements.
void espresso_menu_seconds(void* menu, int64_t numel, double* seconds) {
    const auto& found = static_cast<Menu*>(menu)->seconds(numel);
    std::copy(found.begin(), found.end(), seconds);
}

// For each choice the six respects of `weigh`, in rows.
void espresso_menu_weigh(void* menu, int64_t numel, int number, const int32_t* choices, double* values) {
    const auto& seconds = static_cast<Menu*>(menu)->seconds(numel);
    std::fill(values, values + static_cast<size_t>(number) * RESPECTS, 0.0);
    for (int i = 0; i < number; ++i, values += RESPECTS) static_cast<Menu*>(menu)->weigh(choices[i], seconds, values);
}

// Those of the choices that no other one beats in work on every resource, before the first routine, and after the last one.
int espresso_menu_front(void* menu, int64_t numel, int number, const int32_t* choices, double tolerance, int32_t* front) {
    struct Point {
        double sum;
        int32_t choice;
        double value[RESPECTS];
    };
    const auto& seconds = static_cast<Menu*>(menu)->seconds(numel);
    std::vector<Point> points(number);
    for (int i = 0; i < number; ++i) {
        Point& point = points[i];
        point = Point{0, choices[i], {}};
        static_cast<Menu*>(menu)->weigh(choices[i], seconds, point.value);
        for (double value : point.value) point.sum += value;
    }
    std::sort(points.begin(), points.end(), [](const Point& a, const Point& b) {
        return a.sum != b.sum ? a.sum < b.sum : a.choice < b.choice;
    });
    std::vector<Point> kept;
    for (const Point& point : points) {
        const bool beaten = std::any_of(kept.begin(), kept.end(), [&](const Point& other) {
            for (int d = 0; d < RESPECTS; ++d) {
                if (other.value[d] > point.value[d] * (1 + tolerance)) return false;
            }
            return true;
        });
        if (!beaten) kept.push_back(point);
    }
    for (size_t i = 0; i < kept.size(); ++i) front[i] = kept[i].choice;
    return static_cast<int>(kept.size());
}

void* espresso_plan_new(int count, const double* ready, double backward, double contention, double link_contention,
                        double handling) {
    return new Plan(count, ready, backward, contention, link_contention, handling);
}

void espresso_plan_free(void* plan) { delete static_cast<Plan*>(plan); }

// Gives a unit of `numel` elements a choice of the menu; -1: the unit does nothing.
void espresso_plan_set(void* plan, void* menu, int unit, int64_t numel, int choice) {
    static_cast<Plan*>(plan)->set(unit, static_cast<Menu*>(menu)->walk(choice, numel));
}

double espresso_plan_end(void* plan) { return static_cast<Plan*>(plan)->end(); }

int espresso_plan_hidden(void* plan) { return static_cast<Plan*>(plan)->hidden(); }

// The end with `number` units changed as by `espresso_plan_set`; any value above `limit` where it is above.
double espresso_plan_attempt(void* plan, void* menu, int number, const int32_t* units, const int64_t* numels,
                             const int32_t* choices, double limit) {
    std::vector<Walk> walks;
    for (int i = 0; i < number; ++i) walks.push_back(static_cast<Menu*>(menu)->walk(choices[i], numels[i]));
    return static_cast<Plan*>(plan)->attempt(number, units, walks.data(), limit);
}

// The choice of those given with the least end, if that is at most `below`, else -1; ties go to the first given. `end` gets it.
int espresso_plan_best(void* plan, void* menu, int unit, int64_t numel, int number, const int32_t* choices, double below,
                       double* end) {
    return static_cast<Plan*>(plan)->best(*static_cast<Menu*>(menu), unit, numel, number, choices, below, end);
}

// The choices of two units with the least end below `below`, each of those given for it; 0 if there are none, else 1.
int espresso_plan_best_pair(void* plan, void* menu, const int32_t* units, const int64_t* numels, const int32_t* numbers,
                            const int32_t* choices, double below, int32_t* best, double* end) {
    Plan& p = *static_cast<Plan*>(plan);
    Menu& m = *static_cast<Menu*>(menu);
    const Walk kept = p.walk(units[0]);
    const int32_t* seconds = choices + numbers[0];
    bool found = false;
    *end = below;
    for (int i = 0; i < numbers[0]; ++i) {
        p.set(units[0], m.walk(choices[i], numels[0]));
        double time;
        const int choice = p.best(m, units[1], numels[1], numbers[1], seconds, *end, &time);
        if (choice >= 0 && time < *end) {
            *end = time;
            best[0] = choices[i];
            best[1] = choice;
            found = true;
        }
    }
    p.set(units[0], kept);
    return found;
}

}  // extern "C"
