// The event loop: a plan that is played once and then again with some of its units replaced.

#pragma once

#include <algorithm>
#include <atomic>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "timeline_menu.h"

namespace {

struct Task {
    int32_t unit = -1;
    int32_t step = 0;
};

struct State {
    double now = 0, progress = 0, rate = 1, synced = 0, backward_end = 0;
    double until[RESOURCES] = {INF, INF, INF, INF};
    double pending[RESOURCES] = {0, 0, 0, 0};  // work of ready units that has not begun
    Task at[RESOURCES];
    int32_t head[RESOURCES] = {0, 0, 0, 0}, tail[RESOURCES] = {0, 0, 0, 0};
    int32_t next[LANES] = {0, 0, 0, 0, 0}, passed[LANES] = {0, 0, 0, 0, 0};
    bool serving[LANES] = {false, false, false, false, false};
    int32_t upcoming = 0, in_flight = 0, hidden = 0;
    int64_t events = 0;
};

// What one playing of a plan writes, besides its state. Each thread has its own.
struct Scratch {
    std::vector<int64_t> stamp;        // last playing in which a unit's routine of a lane completed
    std::vector<Task> log[RESOURCES];  // all that ever waited for a resource, in order
    int64_t playing = 0;

    explicit Scratch(int count) : stamp(static_cast<size_t>(count) * LANES, 0) {
        for (auto& each : log) each.resize(static_cast<size_t>(count) * STEPS);
    }
};

class Plan {
public:
    Plan(int count, const double* ready, double backward, double contention, double link_contention, double handling)
        : count_(count), ready_(ready, ready + count), backward_(backward), contention_(contention), handling_(handling),
          walks_(count), states_(count + 1),
          completed_(static_cast<size_t>(count) * LANES, std::numeric_limits<int64_t>::max()), base_(count) {
        scratches_.emplace_back(count);
        ready_.push_back(backward);
        for (int cpu = 0; cpu < 2; ++cpu) {
            for (int links = 0; links < 3; ++links) {
                rates_[0][cpu][links] = 1.0 / (1.0 + (cpu ? contention : 0.0) + links * link_contention);
            }
        }
        way_before_.resize(count + 1);
        way_from_.resize(count + 1);
        for (int r = 0; r < RESOURCES; ++r) {
            behind_[r].resize(count + 1);
            upto_[r].resize(count);
            beyond_[r].resize(count);
            suffix_[r].resize(count + 1);
        }
    }

    void set(int unit, const Walk& walk) {
        walks_[unit] = walk;
        valid_ = std::min(valid_, unit);
    }

    const Walk& walk(int unit) const { return walks_[unit]; }

    // End of the step's synchronisation and backward under the plan as set.
    double end() {
        if (valid_ < count_ || fresh_) {
            measure();
            fresh_ = false;
            total_ = play<true>(base_, valid_ == 0 ? State() : states_[valid_], -1, nullptr, -1, INF);
            valid_ = count_;
        }
        return total_;
    }

    // Units before this one are done before a bubble (E 4.4, Property 1).
    int hidden() {
        end();
        return hidden_;
    }

    // The end with some units' walks replaced; above `limit` any value above it.
    double attempt(int number, const int32_t* units, const Walk* walks, double limit) {
        end();
        int first = count_, last = 0;
        kept_.clear();
        for (int i = 0; i < number; ++i) {
            first = std::min(first, units[i]);
            last = std::max(last, units[i]);
            kept_.push_back(walks_[units[i]]);
            walks_[units[i]] = walks[i];
        }
        double result = play<false>(scratches_[0], states_[first], -1, nullptr, last, limit);
        for (int i = number - 1; i >= 0; --i) walks_[units[i]] = kept_[i];
        return result;
    }

    // The choice of those given with the least end, if that is at most `below`, else -1; ties go to the first given. The most
    // promising come first, and none that a lower bound rules out is played. Threads share the least end as their limit.
    int best(Menu& menu, int unit, int64_t numel, int number, const int32_t* choices, double below, double* end) {
        this->end();
        const auto& seconds = menu.seconds(numel);
        const double ways = std::max(way_before_[unit], way_from_[unit + 1]);
        ranked_.clear();
        for (int place = 0; place < number; ++place) {
            double work[RESPECTS] = {};
            menu.weigh(choices[place], seconds, work);
            const double own = floor(unit, work);
            if (std::max(own, ways) <= below) ranked_.emplace_back(own, place);
        }
        std::sort(ranked_.begin(), ranked_.end());
        // What won last time is likely to be good again, and a good limit ends the other attempts early.
        const auto last = std::find_if(ranked_.begin(), ranked_.end(), [&](const auto& each) { return choices[each.second] == won_; });
        if (last != ranked_.end()) std::rotate(ranked_.begin(), last, last + 1);
        std::atomic<size_t> next{0};
        std::atomic<double> least{below};
        std::mutex mutex;
        int winner = -1;
        auto work = [&](Scratch& scratch) {
            for (size_t index = next++; index < ranked_.size(); index = next++) {
                const auto [floor, place] = ranked_[index];
                if (std::max(floor, ways) > least.load()) continue;
                const Walk walk = menu.walk(choices[place], seconds);
                const double time = play<false>(scratch, states_[unit], unit, &walk, unit, least.load());
                std::lock_guard<std::mutex> lock(mutex);
                if (time < least || (time == least && (winner < 0 || place < winner))) {
                    least = time;
                    winner = place;
                }
            }
        };
        const size_t threads = ranked_.size() * static_cast<size_t>(count_ - unit) < WORTH_THREADS
                                   ? 1
                                   : std::clamp<size_t>(std::thread::hardware_concurrency(), 1, MOST_THREADS);
        while (scratches_.size() < threads) scratches_.emplace_back(count_);
        std::vector<std::thread> helpers;
        for (size_t i = 1; i < threads; ++i) helpers.emplace_back(work, std::ref(scratches_[i]));
        work(scratches_[0]);
        for (auto& helper : helpers) helper.join();
        *end = least;
        if (winner < 0) return -1;
        return won_ = choices[winner];
    }

    // A lower bound of `attempt` for one unit, other units' ways left out. Whatever resource a unit needs, none of that work
    // starts before the unit is ready, nor the work of the units behind it before they are.
    double floor(int unit, const double* work) const {
        const double* before = walks_[unit].load;
        double least = backward_ + suffix_[0][0] - before[0] + work[0];
        double total = work[0];
        for (int r = 1; r < RESOURCES; ++r) {
            least = std::max(least, upto_[r][unit] + (work[r] - before[r]));
            least = std::max(least, beyond_[r][unit]);
            total += work[r];
        }
        return std::max(least, ready_[unit] + total);
    }

private:
    int count_;
    std::vector<double> ready_;
    double backward_, contention_, handling_;
    double rates_[2][2][3] = {};  // of backward, by whether the GPU and the CPU do codec work, and how many links are busy
    std::vector<Walk> walks_;
    std::vector<Walk> kept_;
    std::vector<std::pair<double, int>> ranked_;
    std::vector<State> states_;  // just before each unit is ready
    std::vector<int64_t> completed_;  // event at which a unit's routine of a lane completed, in the plan as set
    Scratch base_;
    std::deque<Scratch> scratches_;  // of trials
    std::vector<double> behind_[RESOURCES], upto_[RESOURCES], beyond_[RESOURCES], suffix_[RESOURCES], way_before_, way_from_;
    int valid_ = 0, hidden_ = 0, won_ = -1;
    bool fresh_ = true;
    double total_ = 0;

    // Work on each resource behind each unit, and the end of the ways of units by themselves, for the lower bounds.
    void measure() {
        way_before_[0] = way_from_[count_] = 0;
        for (int k = 0; k < count_; ++k) way_before_[k + 1] = std::max(way_before_[k], ready_[k] + walks_[k].total);
        for (int k = count_ - 1; k >= 0; --k) way_from_[k] = std::max(way_from_[k + 1], ready_[k] + walks_[k].total);
        for (int r = 0; r < RESOURCES; ++r) {
            suffix_[r][count_] = 0;
            for (int k = count_ - 1; k >= 0; --k) {
                suffix_[r][k] = suffix_[r][k + 1] + walks_[k].load[r];
                behind_[r][k] = ready_[k] + suffix_[r][k];
            }
            double most = 0;
            for (int k = 0; k < count_; ++k) upto_[r][k] = most = std::max(most, behind_[r][k]);
            most = 0;
            for (int k = count_ - 1; k >= 0; --k) {
                beyond_[r][k] = most;
                most = std::max(most, behind_[r][k]);
            }
        }
    }

    // Play from a state on, with the walk of unit `changed` replaced, if any. Units up to `last` differ from the plan as set.
    template <bool BASE>
    double play(Scratch& scratch, const State& from, int changed, const Walk* walk_of_changed, int last, double limit) {
        State s = from;
        const int64_t playing = ++scratch.playing, before = s.events;
        const int ready_before = s.upcoming;
        int32_t borrowed[RESOURCES];  // queue entries before these are the base's
        for (int r = 0; r < RESOURCES; ++r) borrowed[r] = s.tail[r];
        auto walk_at = [&](int unit) -> const Walk& { return !BASE && unit == changed ? *walk_of_changed : walks_[unit]; };
        const double shared = 1.0 + contention_;

        auto request = [&](int unit, int step) {
            const Walk& walk = walk_at(unit);
            const int r = walk.resource[step];
            if (s.at[r].unit >= 0) {
                scratch.log[r][s.tail[r]++] = Task{unit, step};
                return;
            }
            s.at[r] = Task{unit, step};
            s.pending[r] -= walk.seconds[step];
            s.until[r] = s.now + (r == CPU && s.upcoming <= count_ ? walk.seconds[step] * shared : walk.seconds[step]);
        };
        // Let the lane take units, in plan order, until one occupies it with codec work.
        auto serve = [&](int lane) {
            while (!s.serving[lane] && s.next[lane] < s.passed[lane]) {
                const int unit = s.next[lane]++;
                const Walk& walk = walk_at(unit);
                if (lane >= walk.lanes) continue;
                const int step = walk.start[lane];
                request(unit, step);
                s.serving[lane] = !is_link(walk.resource[step]);
            }
        };
        auto complete = [&](int unit, int lane) {
            const size_t place = static_cast<size_t>(unit) * LANES + lane;
            return scratch.stamp[place] == playing || (unit < ready_before && completed_[place] <= before);
        };

        for (;;) {
            double time = INF;
            int unit = count_ + 1, source = -1;
            if (s.upcoming <= count_) {
                const double wait = ready_[s.upcoming] - s.progress;
                if (wait <= 0) {
                    time = s.now, unit = s.upcoming;
                } else if (s.rate > 0) {
                    time = s.now + (s.rate == 1 ? wait : wait / s.rate), unit = s.upcoming;
                }
            }
            for (int r = 0; r < RESOURCES; ++r) {
                if (s.until[r] < time || (s.until[r] == time && time < INF && s.at[r].unit < unit)) {
                    time = s.until[r], unit = s.at[r].unit, source = r;
                }
            }
            if (unit > count_) break;
            if (source < 0 && unit < count_) {
                if (BASE) states_[unit] = s;
                if (!BASE && unit > last) {
                    if (s.in_flight == 0 && states_[unit].in_flight == 0) {
                        return total_ + (time - ready_at(states_[unit], unit));
                    }
                    if (beyond_limit(s, unit, limit, shared)) return INF;
                }
            }
            s.progress += (time - s.now) * s.rate;
            s.now = time;
            ++s.events;

            if (source < 0) {
                if (unit == count_) {
                    s.backward_end = s.now;
                    if (s.at[CPU].unit >= 0) s.until[CPU] = s.now + (s.until[CPU] - s.now) / shared;
                    ++s.upcoming;
                } else {
                    ++s.upcoming;
                    const Walk& walk = walk_at(unit);
                    s.progress -= handling_ * walk.routines;
                    if (walk.count > 0) {
                        if (s.in_flight == 0 && s.synced > 0 && s.now > s.synced) s.hidden = unit;
                        ++s.in_flight;
                        for (int r = 0; r < RESOURCES; ++r) s.pending[r] += walk.load[r];
                    }
                    s.passed[0] = s.upcoming;
                    serve(0);
                }
            } else {
                const int step = s.at[source].step;
                s.at[source].unit = -1;
                s.until[source] = INF;
                if (s.head[source] < s.tail[source]) {  // who waits came before whoever is about to ask
                    const int32_t place = s.head[source]++;
                    const Task task = (BASE || place >= borrowed[source] ? scratch : base_).log[source][place];
                    request(task.unit, task.step);
                }
                const Walk& walk = walk_at(unit);
                const bool more = step + 1 < walk.count;
                const int lane = walk.lane[step];
                if (!more) {
                    s.synced = s.now;
                    --s.in_flight;
                }
                if (is_link(source)) {
                    const size_t place = static_cast<size_t>(unit) * LANES + lane;
                    scratch.stamp[place] = playing;
                    if (BASE) completed_[place] = s.events;
                    if (lane + 1 < LANES) {
                        int32_t& passed = s.passed[lane + 1];
                        while (passed < s.passed[0] && (walk_at(passed).routines <= lane || complete(passed, lane))) ++passed;
                        serve(lane + 1);
                    }
                } else if (more && !is_link(walk.resource[step + 1])) {
                    request(unit, step + 1);  // the lane stays with the unit
                } else {
                    if (more) request(unit, step + 1);
                    s.serving[lane] = false;
                    serve(lane);
                }
            }
            s.rate = rates_[s.at[0].unit >= 0][s.at[CPU].unit >= 0][(s.at[INTRA].unit >= 0) + (s.at[INTRA + 1].unit >= 0)];
        }
        if (BASE) hidden_ = s.hidden;
        return std::max(s.backward_end, s.synced);
    }

    // When the unit of a kept state is ready, if nothing is under way.
    double ready_at(const State& state, int unit) const {
        return state.now + std::max(0.0, ready_[unit] - state.progress) / state.rate;
    }

    bool beyond_limit(const State& s, int unit, double limit, double shared) const {
        if (limit == INF) return false;
        if (s.now + way_from_[unit] - s.progress > limit * (1 + 1e-12)) return true;
        for (int r = 0; r < RESOURCES; ++r) {
            double left = s.pending[r] + suffix_[r][unit];
            if (s.at[r].unit >= 0) left += (s.until[r] - s.now) / (r == CPU ? shared : 1.0);
            if (r == 0) left += backward_ - s.progress;
            if (s.now + left > limit * (1 + 1e-12)) return true;
        }
        return false;
    }
};

}  // namespace
