// Step-size control on plain numbers, what aca_ext.controller does with floats: for loops that do not go through
// Python.
#pragma once
#include <cmath>

namespace aca {

struct Controller {
    int order;
    double safety, ifactor, dfactor, pcoeff, icoeff, dcoeff, min_step, max_step;

    // The step after an accepted one of size h; `ratio` holds the `count` last error ratios, newest first.
    double grow(double h, const double* ratio, int count) const {
        const bool has_memory = pcoeff != 0 || dcoeff != 0;
        const double exponent[] = {-(pcoeff + icoeff + dcoeff) / order, (pcoeff + 2 * dcoeff) / order, -dcoeff / order};
        double factor = safety;
        for (int i = 0; i < (has_memory ? count : 1); ++i) {
            if (exponent[i] == 0) continue;
            if (ratio[i] == 0) {
                factor = ifactor;
                break;
            }
            factor *= std::pow(ratio[i], exponent[i]);
        }
        return limit(h * least(ifactor, most(has_memory ? dfactor : 1.0, factor)));
    }

    // Size of the next trial after a rejected one of size h.
    double shrink(double h, double ratio) const {
        const double smaller =
            std::isfinite(ratio) ? h * most(dfactor, safety * std::pow(ratio, -1.0 / order)) : h * dfactor;
        return smaller < min_step && min_step < h ? min_step : smaller;
    }

    // The first step for an interval of this length by Hairer's rule (Solving ODEs I, II.4): the norms are those of y0
    // and f(t0, y0), and change_of_slope(h) is that of f(t0 + h, y0 + h·f0) - f(t0, y0).
    template <typename ChangeOfSlope>
    double initial(double length, double norm_y, double norm_f, ChangeOfSlope change_of_slope) const {
        if (!std::isfinite(norm_f)) return limit(least(1e-6, length));
        const bool small = norm_y < 1e-5 || norm_f < 1e-5;
        const double h0 = least(small ? 1e-6 : 0.01 * norm_y / norm_f, length);
        const double curvature = change_of_slope(h0) / h0;
        if (!std::isfinite(curvature)) return limit(h0);
        const double largest = most(norm_f, curvature);
        const double h1 = largest <= 1e-15 ? most(1e-6, h0 * 1e-3) : std::pow(0.01 / largest, 1.0 / order);
        return limit(least(least(100 * h0, h1), length));
    }

    double limit(double h) const { return most(min_step, least(max_step, h)); }

  private:
    static double least(double a, double b) { return b < a ? b : a; }
    static double most(double a, double b) { return b > a ? b : a; }
};

}  // namespace aca
