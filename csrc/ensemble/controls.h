// The step control of csrc/control for all lanes at once, as operations on vectors.
#pragma once
#include "control/step_control.h"
#include "ensemble/powers.h"

namespace aca {

// Judgement of the trials, with a bit for each lane.
struct Verdict {
    unsigned accepted = 0;
    unsigned due = 0;       // accepted, and the next requested time is reached
    unsigned at_stop = 0;   // accepted, and the next stop is reached
    unsigned hopeless = 0;  // rejected, and no smaller trial is possible or the error is not finite
};

// The state of every lane between two steps and its trial, named as in StepControl. Results are bitwise those of
// control::judge and control::propose, whose formulas these are, for any number of lanes.
class Controls {
  public:
    Reals t{}, h{}, h_trial{}, t_next{}, ratio{}, ratios[3]{};
    Reals sign{}, stop{}, time{};  // the next stop, and the next requested time, NaN behind the last
    OfLanes<Counts, int64_t> live{}, n_steps{}, n_accepted{};  // live: -1 where there is a sample, else 0

    ACA_HD explicit Controls(const Controller& controller)
        : controller_(controller),
          exponent_(controller.shrink_exponent()),
          has_one_power_(!controller.has_memory() && -controller.icoeff / controller.order == exponent_) {}

    ACA_HD bool is_live(int l) const { return live.each[l]; }
    ACA_HD bool is_due(int l) const { return sign.each[l] * time.each[l] <= sign.each[l] * t_next.each[l]; }
    ACA_HD bool is_cut(int l) const { return t_next.each[l] == stop.each[l]; }

    // Puts a solve whose trial was proposed into a lane.
    ACA_HD void put(int l, const StepControl& s) {
        live.each[l] = -1;
        t.each[l] = s.t, h.each[l] = s.h, h_trial.each[l] = s.h_trial, t_next.each[l] = s.t_next;
        sign.each[l] = s.sign;
        n_steps.each[l] = s.n_steps, n_accepted.each[l] = s.n_accepted;
        for (int i = 0; i < 3; ++i) ratios[i].each[l] = s.ratios[i];
        find_stop(l, s);
        find_time(l, s);
    }

    ACA_HD void find_stop(int l, const StepControl& s) {
        stop.each[l] = control::at<const double>(s.stops)[s.next_stop];
    }
    ACA_HD void find_time(int l, const StepControl& s) {
        time.each[l] = s.next_output < s.n_times ? control::at<const double>(s.times)[s.next_output] : kNaN;
    }

    // Returns the state of a lane to its solve.
    ACA_HD void get(int l, StepControl& s) const {
        s.t = t.each[l], s.h = h.each[l];
        s.n_steps = n_steps.each[l], s.n_accepted = n_accepted.each[l];
        s.n_ratios = int(s.n_accepted < 3 ? s.n_accepted : 3);
        for (int i = 0; i < 3; ++i) s.ratios[i] = ratios[i].each[l];
    }

    ACA_HD void clear(int l) {
        live.each[l] = 0;
        h_trial.each[l] = 0;
        t_next.each[l] = t.each[l];
    }

    // Judges trials by their error ratios, and chooses the sizes of the next ones; t stays where they start.
    ACA_HD Verdict judge(M& accepted) {
        Verdict verdict;
        Doubles powers[kParts];  // all of them first, since each takes long and they do not wait for one another
        for (int part = 0; part < kParts; ++part) powers[part] = power_of(ratio.parts[part], exponent_);
        for (int part = 0; part < kParts; ++part) judge(part, powers[part], accepted, verdict);
        return verdict;
    }

    // Positions of the next requested times in the trials.
    ACA_HD Reals positions() const {
        Reals theta;
        for (int part = 0; part < kParts; ++part)
            theta.parts[part] = control::position(time.parts[part], t.parts[part], t_next.parts[part]);
        return theta;
    }

    // Moves t to the ends of accepted trials.
    ACA_HD void move_on() {
        for (int part = 0; part < kParts; ++part)
            t.parts[part] = is_accepted_[part] ? t_next.parts[part] : t.parts[part];
    }

    // Proposes the next trials, of length zero where there is no sample. Returns the lanes that can have none.
    ACA_HD unsigned propose(int64_t max_num_steps) {
        unsigned without = 0;
        for (int part = 0; part < kParts; ++part) without |= propose(part, max_num_steps) << part * kWidth;
        return without;
    }

    ACA_HD bool can_shrink(int l) const { return control::can_shrink(controller_, t.each[l], h.each[l], sign.each[l]); }

  private:
    ACA_HD void judge(int part, Doubles power, M& accepted, Verdict& verdict) {
        const Doubles tried = control::magnitude(h_trial.parts[part]), from = t.parts[part], to = t_next.parts[part];
        const Doubles error = ratio.parts[part], way = sign.parts[part];
        const Truths is_live = live.parts[part] != 0, is_accepted = is_live & (error <= 1);
        const Truths is_finite = error - error == 0, is_cut = to == stop.parts[part];
        count(part, is_accepted);
        const Doubles usual = error == 0 ? controller_.ifactor - Doubles{} : controller_.safety * power;
        const Doubles growth = has_one_power_ ? usual : growths(part, bits_of_truths(is_accepted), power);
        const Doubles grown = controller_.grown(tried, to_single(growth));
        const Doubles factor = is_finite ? to_single(usual) : controller_.dfactor - Doubles{};
        const Doubles shrunk = controller_.shrunk(tried, factor);
        Doubles& next = h.parts[part];
        next = is_accepted ? control::next_size(is_cut, next, grown) : shrunk;
        const Truths is_hopeless = (is_finite == 0) | (control::can_shrink(controller_, from, next, way) == 0);
        const Truths is_due = way * time.parts[part] <= way * to;
        is_accepted_[part] = is_accepted;
        set_truths(accepted, part, is_accepted);
        const int shift = part * kWidth;
        verdict.accepted |= bits_of_truths(is_accepted) << shift;
        verdict.due |= bits_of_truths(is_accepted & is_due) << shift;
        verdict.at_stop |= bits_of_truths(is_accepted & is_cut) << shift;
        verdict.hopeless |= bits_of_truths((is_live & is_hopeless) & (is_accepted == 0)) << shift;
    }

    ACA_HD unsigned propose(int part, int64_t max_num_steps) {
        const Doubles from = t.parts[part];
        const Truths is_live = live.parts[part] != 0;
        Doubles step, to;
        control::choose_trial(from, h.parts[part], sign.parts[part], stop.parts[part], step, to);
        h_trial.parts[part] = is_live ? step : Doubles{};
        t_next.parts[part] = is_live ? to : from;
        return bits_of_truths(is_live & ((n_steps.parts[part] >= max_num_steps) | (to == from)));
    }

    ACA_HD void count(int part, Truths is_accepted) {
        n_steps.parts[part] += 1;
        Counts& accepted = n_accepted.parts[part];
        accepted = is_accepted ? accepted + 1 : accepted;
        for (int i = 2; i >= 0; --i) {  // a fixed number, so that a GPU keeps the state in registers
            if (i > 0 && !controller_.has_memory()) continue;
            const Doubles newer = i > 0 ? ratios[i - 1].parts[part] : ratio.parts[part];
            ratios[i].parts[part] = is_accepted ? newer : ratios[i].parts[part];
        }
    }

    // Growth of the steps of some lanes, where it takes other powers than the usual one.
    ACA_HD Doubles growths(int part, unsigned lanes, Doubles power) const {
        OfLanes<Doubles, double> known, found{};
        known.parts[0] = power;
        each_lane(lanes, [&](int i) {
            const int l = part * kWidth + i;
            const double base = ratio.each[l], of_base = known.each[i];
            const double last[] = {ratios[0].each[l], ratios[1].each[l], ratios[2].each[l]};
            const int count = int(n_accepted.each[l] < 3 ? n_accepted.each[l] : 3);
            const auto power_or_known = [=](double x, double e) {
                return x == base && e == exponent_ ? of_base : math::pow(x, e);
            };
            found.each[i] = controller_.growth(last, count, power_or_known);
        });
        return found.parts[0];
    }

    const Controller controller_;
    const double exponent_;
    const bool has_one_power_;
    Truths is_accepted_[kParts]{};  // of the trials
};

}  // namespace aca
