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

    double limit(double h) const { return most(min_step, least(max_step, h)); }

  private:
    static double least(double a, double b) { return b < a ? b : a; }
    static double most(double a, double b) { return b > a ? b : a; }
};

}  // namespace aca
