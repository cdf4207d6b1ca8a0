// Step-size controller on plain numbers, for host and device: the twin of aca_ext.numerics.controller in C++.
#pragma once
#include "control/mathematics.h"

#ifdef __CUDACC__
#define ACA_HD __host__ __device__ __forceinline__
#else
#define ACA_HD inline
#endif

namespace aca {

// A power as the mathematical library has it; loops over many solves have their own.
struct Power {
    ACA_HD double operator()(double base, double exponent) const { return math::pow(base, exponent); }
};

// pow differs in its last bits between math libraries; rounded to single precision, the results agree.
ACA_HD double to_single(double x) { return double(float(x)); }

struct Controller {
    int order;
    double safety, ifactor, dfactor, pcoeff, icoeff, dcoeff, min_step, max_step;

    // Size of the step after an accepted one of size h. `ratio` holds the `count` last error ratios, newest first.
    template <typename PowerOf = Power>
    ACA_HD double grow(double h, const double* ratio, int count, PowerOf power = PowerOf()) const {
        return grown(h, to_single(growth(ratio, count, power)));
    }

    // Factor by which a step would grow without limits.
    template <typename PowerOf>
    ACA_HD double growth(const double* ratio, int count, PowerOf power) const {
        const double gains[] = {-(pcoeff + icoeff + dcoeff), pcoeff + 2 * dcoeff, -dcoeff};
        double factor = safety;
        for (int i = 0; i < 3; ++i) {  // a fixed number, so that a GPU keeps the ratios in registers
            if (gains[i] == 0 || i >= (has_memory() ? count : 1)) continue;
            if (ratio[i] == 0) return ifactor;
            factor *= power(ratio[i], gains[i] / order);
        }
        return factor;
    }

    ACA_HD bool has_memory() const { return pcoeff != 0 || dcoeff != 0; }
    ACA_HD double shrink_exponent() const { return -1.0 / order; }

    // Size of the trial after a rejected one of size h.
    template <typename PowerOf = Power>
    ACA_HD double shrink(double h, double ratio, PowerOf power = PowerOf()) const {
        const bool is_finite = ratio - ratio == 0;
        return shrunk(h, is_finite ? to_single(safety * power(ratio, shrink_exponent())) : dfactor);
    }

    // Sizes after an accepted step of size h and after a rejected one, by the factors that error ratios wish for. A
    // Real is a number or a vector of them.
    template <typename Real>
    ACA_HD Real grown(Real h, Real factor) const {
        const Real lowest = filled<Real>(has_memory() ? dfactor : 1.0);
        return limit(h * least(filled<Real>(ifactor), most(lowest, factor)));
    }
    template <typename Real>
    ACA_HD Real shrunk(Real h, Real factor) const {
        const Real smaller = h * most(filled<Real>(dfactor), factor), smallest = filled<Real>(min_step);
        return (smaller < smallest) & (smallest < h) ? smallest : smaller;
    }

    // First step by Hairer's rule (Solving ODEs I, II.4): an Euler step to try, then the first step that follows from
    // it. The norms, in units of the tolerance, are of y0, of f(t0, y0) and of the change of f along the Euler step.
    ACA_HD double euler_step(double length, double norm_y, double norm_f) const {
        const bool small = norm_y < 1e-5 || norm_f < 1e-5;
        return least(small ? 1e-6 : 0.01 * norm_y / norm_f, length);
    }
    ACA_HD double first_step(double length, double euler, double norm_f, double norm_change) const {
        const double curvature = norm_change / euler;
        if (!(curvature - curvature == 0)) return limit(euler);
        const double largest = most(norm_f, curvature);
        const double h1 =
            largest <= 1e-15 ? most(1e-6, euler * 1e-3) : to_single(math::pow(0.01 / largest, 1.0 / order));
        return limit(least(least(100 * euler, h1), length));
    }

    template <typename Real>
    ACA_HD Real limit(Real h) const {
        return most(filled<Real>(min_step), least(filled<Real>(max_step), h));
    }

  private:
    // x in all lanes; x + Real{} would turn -0 into 0.
    template <typename Real>
    ACA_HD static Real filled(double x) {
        return x - Real{};
    }
    template <typename Real>
    ACA_HD static Real least(Real a, Real b) {
        return b < a ? b : a;
    }
    template <typename Real>
    ACA_HD static Real most(Real a, Real b) {
        return b > a ? b : a;
    }
};

}  // namespace aca
