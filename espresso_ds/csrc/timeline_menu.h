// The choices of the timeline: an option's steps with their seconds, from curves over sizes (planner/cost.py, planner/menu.py).

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <unordered_map>
#include <vector>

namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr int RESOURCES = 4, CPU = 1, INTRA = 2;  // compute, CPU, link inside the node, link between nodes
constexpr int RESPECTS = RESOURCES + 2;            // in which choices are compared
constexpr int STEPS = 12, LANES = 5;              // an option has at most 12 actions, 4 of them routines

constexpr size_t WORTH_THREADS = 4000, MOST_THREADS = 8;  // choices times units behind, from which threads pay

bool is_link(int resource) { return resource >= INTRA; }

struct Walk {
    int count = 0, lanes = 0, routines = 0;
    int8_t resource[STEPS];
    int8_t lane[STEPS];
    int8_t start[LANES];  // first step of each lane
    double seconds[STEPS];
    double load[RESOURCES] = {0, 0, 0, 0};
    double total = 0;

    Walk() = default;

    Walk(int steps, const int8_t* resources, const double* durations) : count(steps) {
        for (int step = 0; step < steps; ++step) {
            if (step == 0 || is_link(resource[step - 1])) start[lanes++] = static_cast<int8_t>(step);
            resource[step] = resources[step];
            lane[step] = static_cast<int8_t>(lanes - 1);
            seconds[step] = durations[step];
            load[resources[step]] += durations[step];
            total += durations[step];
            routines += is_link(resources[step]);
        }
    }
};

// A piecewise linear function: planner/curves.py.
struct Curve {
    std::vector<double> x, y;
    double slope;

    double operator()(double size) const {
        const double above = slope * std::max(0.0, size - x.back());
        if (size >= x.back()) return y.back() + above;
        const size_t right = std::upper_bound(x.begin(), x.end(), size) - x.begin();
        const double rise = (y[right] - y[right - 1]) / (x[right] - x[right - 1]);
        return rise * (size - x[right - 1]) + y[right - 1];
    }
};

// What planner/cost.py calls an operation: its seconds are a function of the unit's number of elements.
struct Operation {
    int8_t resource;
    int32_t curve;    // seconds over elements (codec work) or bytes (routines)
    int32_t payload;  // payload bytes over elements; -1: sent as it is; -2: codec work
    int32_t rows, divisor, padded;
};

// The choices for a unit, and what they take for units of any size.
class Menu {
public:
    Menu(double element_bytes, int curves, const int32_t* points, const double* x, const double* y, const double* slopes,
         int operations, const int32_t* fields, int choices, const int16_t* steps, const int8_t* counts)
        : element_bytes_(element_bytes), steps_(steps, steps + static_cast<size_t>(choices) * STEPS),
          counts_(counts, counts + choices) {
        for (int i = 0; i < curves; ++i) {
            curves_.push_back(Curve{{x, x + points[i]}, {y, y + points[i]}, slopes[i]});
            x += points[i];
            y += points[i];
        }
        for (int i = 0; i < operations; ++i, fields += 6) {
            operations_.push_back(Operation{static_cast<int8_t>(fields[0]), fields[1], fields[2], fields[3], fields[4], fields[5]});
        }
    }

    const std::vector<double>& seconds(int64_t numel) {
        auto [place, fresh] = seconds_.try_emplace(numel);
        if (fresh) {
            for (const Operation& op : operations_) {
                const int64_t elements = (numel + op.divisor - 1) / op.divisor;
                double size = static_cast<double>(elements), times = 1;
                if (op.payload == -2) {
                    times = op.rows;
                } else if (op.payload >= 0) {
                    size = op.rows * std::max(1.0, curves_[op.payload](size));
                } else {
                    size = static_cast<double>((elements + op.padded - 1) / op.padded * op.padded) * element_bytes_;
                }
                place->second.push_back(times * curves_[op.curve](size));
            }
        }
        return place->second;
    }

    Walk walk(int choice, int64_t numel) {
        if (choice < 0) return Walk();
        return walk(choice, seconds(numel));
    }

    Walk walk(int choice, const std::vector<double>& seconds) const {
        int8_t resource[STEPS];
        double duration[STEPS];
        const int16_t* row = &steps_[static_cast<size_t>(choice) * STEPS];
        for (int step = 0; step < counts_[choice]; ++step) {
            resource[step] = operations_[row[step]].resource;
            duration[step] = seconds[row[step]];
        }
        return Walk(counts_[choice], resource, duration);
    }

    // Adds up a choice's work on each resource, before the first routine, and after the last one.
    void weigh(int choice, const std::vector<double>& seconds, double* value) const {
        const int16_t* row = &steps_[static_cast<size_t>(choice) * STEPS];
        double codec = 0;
        bool sent = false;
        for (int step = 0; step < counts_[choice]; ++step) {
            const int resource = operations_[row[step]].resource;
            value[resource] += seconds[row[step]];
            if (is_link(resource)) {
                if (!sent) value[RESOURCES] = codec;
                sent = true;
                codec = 0;
            } else {
                codec += seconds[row[step]];
            }
        }
        value[RESOURCES + 1] = codec;
    }

private:
    double element_bytes_;
    std::vector<Curve> curves_;
    std::vector<Operation> operations_;
    std::vector<int16_t> steps_;
    std::vector<int8_t> counts_;
    std::unordered_map<int64_t, std::vector<double>> seconds_;
};

}  // namespace
