// Lanes: vectors of numbers, one for each of several samples, and the functions on them that generated code calls.
//
// V holds numbers of the state's type T, M truths, and R the same numbers in double precision. Every operation is the
// same in all lanes, with no contraction that depends on what the compiler sees around it, so that the results of a
// sample do not depend on its lane or on its neighbours. ACA_ONE_LANE is defined where a thread is a lane.
#pragma once
#include <cstring>

#if defined(ACA_ONE_LANE)
#include "ensemble/one_lane.h"
#else
#include "ensemble/vectors.h"
#endif

// ACA_HD_CALLED: functions that are too long to be compiled into each of their callers. ACA_LOOP: loops that are not
// unrolled on a GPU, whose arrays would not fit into registers anyway.
#ifdef __CUDACC__
#define ACA_HD_CALLED __host__ __device__ __noinline__
#define ACA_LOOP _Pragma("unroll 1")
#else
#define ACA_HD_CALLED __attribute__((noinline))
#define ACA_LOOP
#endif

namespace aca {

constexpr int kParts = kLanes / kWidth;

// Numbers of 64 bits, one for each lane, in as many vectors as that takes.
template <typename Part, typename Number>
union OfLanes {
    Part parts[kParts];
    Number each[kLanes];
};
using Reals = OfLanes<Doubles, double>;

ACA_HD R all_of(const Reals& x) {
    R all;
    std::memcpy(&all, &x, sizeof all);
    return all;
}
ACA_HD Reals parts_of(R all) {
    Reals x;
    std::memcpy(&x, &all, sizeof all);
    return x;
}

ACA_HD M never() { return M{}; }
ACA_HD M always() { return ~M{}; }

// A function of numbers in every lane.
template <typename F>
ACA_HD V each(F f, V a) {
    V r;
    for (int l = 0; l < kLanes; ++l) r[l] = f(a[l]);
    return r;
}
template <typename F>
ACA_HD V each(F f, V a, V b) {
    V r;
    for (int l = 0; l < kLanes; ++l) r[l] = f(a[l], b[l]);
    return r;
}

ACA_HD V magnitude(V a) {
    const M sign = always() << int(8 * sizeof(T) - 1);
    return of_bits(bits_of(a) & ~sign);
}
ACA_HD V sign(V a) { return select(a > K(0), K(1), select(a < K(0), K(-1), a)); }  // NaN, and zero, as they are
ACA_HD V maximum(V a, V b) { return select((a > b) | (a != a), a, b); }            // NaN where one is
ACA_HD V minimum(V a, V b) { return select((a < b) | (a != a), a, b); }

// Functions of C++, where lanes have no others.
#ifndef ACA_FUNCTION
#define ACA_FUNCTION(name, digits)                         \
    ACA_HD V name(V a) {                                   \
        return each([](T x) { return math::name(x); }, a); \
    }
#define ACA_FUNCTION2(name, called, digits)                             \
    ACA_HD V name(V a, V b) {                                           \
        return each([](T x, T y) { return math::called(x, y); }, a, b); \
    }
#endif

ACA_FUNCTION(exp, u10)
ACA_FUNCTION(exp2, u10)
ACA_FUNCTION(expm1, u10)
ACA_FUNCTION(log, u10)
ACA_FUNCTION(log2, u10)
ACA_FUNCTION(log10, u10)
ACA_FUNCTION(log1p, u10)
ACA_FUNCTION(sin, u10)
ACA_FUNCTION(cos, u10)
ACA_FUNCTION(tan, u10)
ACA_FUNCTION(asin, u10)
ACA_FUNCTION(acos, u10)
ACA_FUNCTION(atan, u10)
ACA_FUNCTION(sinh, u10)
ACA_FUNCTION(cosh, u10)
ACA_FUNCTION(asinh, u10)
ACA_FUNCTION(acosh, u10)
ACA_FUNCTION(atanh, u10)
ACA_FUNCTION(erf, u10)
ACA_FUNCTION(erfc, u15)
ACA_FUNCTION2(power, pow, u10)
ACA_FUNCTION2(atan2, atan2, u10)
ACA_FUNCTION2(hypot, hypot, u05)

// E / (E + 2) with E = exp(2|x|) - 1 as 2^n·(exp(r) - 1) + (2^n - 1), |r| at most ln(2) / 2, by Taylor's polynomial. A
// third of the time of SLEEF's, for two roundings more.
ACA_HD V tanh(V x) {
    constexpr bool is_double = sizeof(T) == 8;
    constexpr int kBits = is_double ? 52 : 23;
    const V bound = K(is_double ? 20 : 10);  // beyond, the result is 1
    V size = magnitude(x);
    size = select(size < bound, size + size, bound + bound);
    const V shift = K(is_double ? 6755399441055744.0 : 12582912.0);  // rounds to whole numbers, and shows their bits
    const V shifted = fma(size, K(1.4426950408889634074), shift), whole = shifted - shift;
    const V high = K(is_double ? 0.693147180369123816490 : 0.693359375);
    const V low = K(is_double ? 1.90821492927058770002e-10 : -2.12194440054690582767e-4);
    const V r = fma(-whole, low, fma(-whole, high, size));
    constexpr int kDegree = is_double ? 13 : 7;
    double coefficient = 1;
    for (int i = 2; i <= kDegree; ++i) coefficient /= i;
    V p = K(coefficient);
    for (int i = kDegree; i > 1; --i) p = fma(p, r, K(coefficient *= i));
    p *= r;
    const M exponent = ((bits_of(shifted) - bits_of(shift)) + Truth((1 << (is_double ? 10 : 7)) - 1)) << kBits;
    const V power = of_bits(exponent), e = fma(power, p, power - K(1));
    const V result = e / (e + K(2));
    return select(x < K(0), -result, select(x > K(0), result, x));  // zero and NaN as they are
}

ACA_HD V floor(V a) {
    return each([](T x) { return math::floor(x); }, a);
}
ACA_HD V ceil(V a) {
    return each([](T x) { return math::ceil(x); }, a);
}
ACA_HD V trunc(V a) {
    return each([](T x) { return math::trunc(x); }, a);
}
ACA_HD V round(V a) {  // halves to the even number
    return each([](T x) { return math::nearbyint(x); }, a);
}
ACA_HD V fmod(V a, V b) {
    return each([](T x, T y) { return math::fmod(x, y); }, a, b);
}
ACA_HD V remainder(V a, V b) {  // with the sign of b
    const auto modulo = [](T x, T y) {
        const T rest = math::fmod(x, y);
        return rest != 0 && (y < 0) != (rest < 0) ? rest + y : rest;
    };
    return each(modulo, a, b);
}

ACA_HD V floor_divide(V a, V b) {  // as torch and Python: the whole number below, whatever the quotient rounds to
    const auto divide = [](T x, T y) {
        if (y == 0) return x / y;
        const T rest = math::fmod(x, y);
        T quotient = (x - rest) / y;
        if (rest != 0 && (y < 0) != (rest < 0)) quotient -= 1;
        if (quotient == 0) return math::copysign(T(0), x / y);
        const T whole = math::floor(quotient);
        return quotient - whole > T(0.5) ? whole + 1 : whole;
    };
    return each(divide, a, b);
}

template <int n>
ACA_HD V multiplied(V x) {  // x to the power of n
    if constexpr (n == 1) {
        return x;
    } else {
        const V half = multiplied<n / 2>(x);
        return n % 2 ? half * half * x : half * half;
    }
}

}  // namespace aca
