// The best of all plans of a few units: depth-first branch and bound over every combination of their candidates.
//
// F is that of the planner's own timeline. A branch is left out only where a lower bound of every plan in it reaches the limit.
// The bound follows from what the timeline keeps to (planner/timeline.py), whatever the units that are not decided do:
//   - a unit starts no earlier than it is ready, and its steps follow each other;
//   - a lane is one server that takes units in plan order, and none enters lane k + 1 before the k-th routines of all earlier units
//     are complete, so that the requests of one lane for one link are served in plan order too;
//   - the work of any set of units on one resource starts no earlier than their earliest use of it, takes the sum of their work,
//     and leaves at least the least of what they have to do afterwards;
//   - codec work on the CPU takes 1 + contention times as long while backward runs, which ends no earlier than undisturbed;
//   - the device of the tensors does all of backward and all of its codec work;
//   - as long as no earlier unit compresses on the CPU first, what earlier units compress on the device holds backward up.
// Candidates that are the same steps with the same seconds are one. Of those by which the first unit is done before the second is
// ready, only that which holds backward up least is looked at: all that follows is the same but for that shift. No other dominance
// is used.

#include "../../espresso_ds/csrc/timeline.cpp"

#include <cstring>
#include <numeric>

namespace {

struct Candidate {
    Walk walk;
    int32_t index;
    double tail[RESOURCES];  // seconds after the last step on the resource
    double first = 0;        // of codec work before the first routine
    bool first_on_device = true;

    Candidate(const Walk& given, int32_t number) : walk(given), index(number) {
        double before = 0;
        for (int step = 0; step < walk.count; ++step) {
            const int r = walk.resource[step];
            before += walk.seconds[step];
            tail[r] = walk.total - before;
            if (walk.lane[step] == 0 && !is_link(r)) {
                first += walk.seconds[step];
                first_on_device &= r == 0;
            }
        }
    }

    bool same(const Candidate& other) const {
        return walk.count == other.walk.count && !std::memcmp(walk.resource, other.walk.resource, walk.count) &&
               !std::memcmp(walk.seconds, other.walk.seconds, walk.count * sizeof(double));
    }
};

class Search {
public:
    Search(int count, const double* ready, double backward, double contention, double link_contention)
        : count_(count), ready_(ready, ready + count), backward_(backward), shared_(1.0 + contention), link_contention_(link_contention),
          plan_(count, ready, backward, contention, link_contention), candidates_(count), chosen_(count, nullptr) {}

    void add(int unit, const Walk& walk, int32_t index) {
        Candidate candidate(walk, index);
        std::vector<Candidate>& all = candidates_[unit];
        const bool known = std::any_of(all.begin(), all.end(), [&](const Candidate& other) { return candidate.same(other); });
        if (!known) all.push_back(candidate);
    }

    // The least end below `limit`, or `limit`. `best` gets the candidates' indices.
    double run(double limit, int64_t budget, int32_t* best) {
        limit_ = limit, budget_ = budget, best_ = best;
        keep_least_delay();
        order_.resize(count_);
        std::iota(order_.begin(), order_.end(), 0);
        std::vector<size_t> open(count_);
        for (int unit = 0; unit < count_; ++unit) {
            std::vector<Candidate>& all = candidates_[unit];
            std::vector<std::pair<double, size_t>> ranked;
            for (size_t i = 0; i < all.size(); ++i) {
                chosen_[unit] = &all[i];
                ranked.emplace_back(bound(), i);
            }
            chosen_[unit] = nullptr;
            std::sort(ranked.begin(), ranked.end());
            std::vector<Candidate> sorted;
            for (const auto& [least, i] : ranked) {
                sorted.push_back(all[i]);
                open[unit] += least < limit;
            }
            all = std::move(sorted);
        }
        std::stable_sort(order_.begin(), order_.end(), [&](int a, int b) { return open[a] < open[b]; });
        if (open[order_[0]] > 0) descend(0);
        return limit_;
    }

    int64_t played = 0, bounded = 0;
    bool finished = true;

private:
    int count_;
    std::vector<double> ready_;
    double backward_, shared_, link_contention_;
    Plan plan_;
    std::vector<std::vector<Candidate>> candidates_;
    std::vector<const Candidate*> chosen_;
    std::vector<int> order_;
    std::vector<std::pair<double, const Candidate*>> open_[16];
    double limit_ = 0;
    int64_t budget_ = 0;
    int32_t* best_ = nullptr;

    void keep_least_delay() {
        if (count_ == 1) return;
        const double links = link_contention_ / (1.0 + link_contention_);
        auto delay = [&](const Candidate& c) {
            return c.walk.load[0] + c.walk.load[CPU] * (shared_ - 1.0) + (c.walk.load[INTRA] + c.walk.load[INTRA + 1]) * links;
        };
        std::vector<Candidate> kept;
        const Candidate* least = nullptr;
        for (const Candidate& c : candidates_[0]) {
            if (ready_[0] + c.walk.total + c.walk.load[CPU] * (shared_ - 1.0) >= ready_[1]) {
                kept.push_back(c);
            } else if (least == nullptr || delay(c) < delay(*least)) {
                least = &c;
            }
        }
        if (least != nullptr) kept.push_back(*least);
        candidates_[0] = std::move(kept);
    }

    void descend(int depth) {
        const int unit = order_[depth];
        auto& open = open_[depth];
        open.clear();
        for (const Candidate& candidate : candidates_[unit]) {
            chosen_[unit] = &candidate;
            const double least = bound();
            if (least < limit_) open.emplace_back(least, &candidate);
        }
        bounded += static_cast<int64_t>(candidates_[unit].size());
        std::sort(open.begin(), open.end());
        for (const auto& [least, candidate] : open) {
            if (least >= limit_ || !finished) break;
            chosen_[unit] = candidate;
            plan_.set(unit, candidate->walk);
            if (depth + 1 < count_) {
                descend(depth + 1);
                continue;
            }
            finished = ++played < budget_;
            const double end = plan_.end();
            if (end < limit_) {
                limit_ = end;
                for (int k = 0; k < count_; ++k) best_[k] = chosen_[k]->index;
            }
        }
        chosen_[unit] = nullptr;
    }

    // When codec work on the CPU ends that starts at `now` or later: backward, which lasts at least as long as undisturbed, slows it.
    double worked(double now, double seconds) const {
        const double beside = std::max(0.0, backward_ - now);
        return seconds * shared_ <= beside ? now + seconds * shared_ : now + beside + (seconds - beside / shared_);
    }

    // Of the end, whatever the units without a choice do.
    double bound() const {
        double issued[LANES] = {}, handed[LANES] = {}, served[LANES][RESOURCES] = {};
        double use[16][RESOURCES];
        double least = 0, stopped = 0, compute = backward_;
        bool known = true;  // how long backward is held up before the unit is ready
        for (int k = 0; k < count_; ++k) {
            if (chosen_[k] == nullptr) {
                known = false;
                continue;
            }
            const Walk& walk = chosen_[k]->walk;
            double now = ready_[k] + stopped, early[RESOURCES] = {INF, INF, INF, INF};
            int step = 0;
            for (int lane = 0; lane < walk.lanes; ++lane) {
                now = std::max(now, issued[lane]);
                if (lane > 0) now = std::max(now, handed[lane - 1]);
                for (; step < walk.count && !is_link(walk.resource[step]); ++step) {
                    early[walk.resource[step]] = std::min(early[walk.resource[step]], now);
                    now = walk.resource[step] == CPU ? worked(now, walk.seconds[step]) : now + walk.seconds[step];
                }
                issued[lane] = now;
                if (step == walk.count) break;
                const int link = walk.resource[step];
                now = std::max(now, served[lane][link]);
                early[link] = std::min(early[link], now);
                now += walk.seconds[step++];
                served[lane][link] = now;
                handed[lane] = std::max(handed[lane], now);
            }
            least = std::max(least, now);
            compute += walk.load[0];
            std::copy(early, early + RESOURCES, use[k]);
            known = known && chosen_[k]->first_on_device;
            if (known) stopped += chosen_[k]->first;
        }
        least = std::max(least, compute);
        for (int r = CPU; r < RESOURCES; ++r) {
            double start = INF, work = 0, tail = INF;
            for (int k = count_ - 1; k >= 0; --k) {
                if (chosen_[k] == nullptr || chosen_[k]->walk.load[r] == 0) continue;
                start = std::min(start, use[k][r]);
                work += chosen_[k]->walk.load[r];
                tail = std::min(tail, chosen_[k]->tail[r]);
                least = std::max(least, start + work + tail);
            }
        }
        return least * (1 - 1e-12);
    }
};

}  // namespace

// The least end of all plans of `units` units with `number` candidates each, given as steps[number], and by unit and candidate
// resources[number][12] and seconds[units][number][12]; `limit` if none is below. `best` gets the candidates of that plan,
// `work` the plans played, the bounds taken, and 1 if at most `budget` plans had to be played.
extern "C" double espresso_exact(int units, const double* ready, double backward, double contention, double link_contention,
                                 int number, const int8_t* steps, const int8_t* resources, const double* seconds, double limit,
                                 int64_t budget, int32_t* best, int64_t* work) {
    Search search(units, ready, backward, contention, link_contention);
    for (int unit = 0; unit < units; ++unit) {
        for (int i = 0; i < number; ++i) {
            const size_t row = static_cast<size_t>(unit) * number + i;
            search.add(unit, Walk(steps[i], resources + static_cast<size_t>(i) * STEPS, seconds + row * STEPS), i);
        }
    }
    const double end = search.run(limit, budget, best);
    work[0] = search.played, work[1] = search.bounded, work[2] = search.finished;
    return end;
}
