// Lanes: vectors of numbers, one for each of several samples, and the functions on them that generated code calls.
//
// V holds numbers of the state's type T, M truths, and R the same numbers in double precision. Every operation is the
// same in all lanes, with no contraction that depends on what the compiler sees around it, so that the results of a
// sample do not depend on its lane or on its neighbours.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX512F__
#define ACA_VECTOR_BYTES 64
#elif defined(__AVX__)
#define ACA_VECTOR_BYTES 32
#else
#define ACA_VECTOR_BYTES 16
#endif

namespace aca {

constexpr int kLanes = ACA_VECTOR_BYTES / int(sizeof(T));

typedef double Doubles __attribute__((vector_size(ACA_VECTOR_BYTES)));
typedef float Floats __attribute__((vector_size(ACA_VECTOR_BYTES)));
typedef std::conditional_t<sizeof(T) == 8, Doubles, Floats> V;
typedef std::conditional_t<sizeof(T) == 8, int64_t, int32_t> Truth;
typedef Truth M __attribute__((vector_size(kLanes * sizeof(T))));
typedef double R __attribute__((vector_size(kLanes * sizeof(double))));

inline V K(double x) { return T(x) - V{}; }  // + would be an addition, for -0 + 0 is not -0
inline M never() { return M{}; }
inline M always() { return ~M{}; }
inline V select(M m, V a, V b) { return m ? a : b; }

// A function of numbers in every lane.
template <typename F>
inline V each(F f, V a) {
    V r;
    for (int l = 0; l < kLanes; ++l) r[l] = f(a[l]);
    return r;
}
template <typename F>
inline V each(F f, V a, V b) {
    V r;
    for (int l = 0; l < kLanes; ++l) r[l] = f(a[l], b[l]);
    return r;
}

// By builtins, which take a tenth of the time that it takes to compile the header with their names.
#if defined(__clang__)
inline V fma(V a, V b, V c) { return __builtin_elementwise_fma(a, b, c); }
inline V sqrt(V a) { return __builtin_elementwise_sqrt(a); }
#elif defined(__AVX512F__)
constexpr int kCurrentRounding = 4;
inline Doubles fused(Doubles a, Doubles b, Doubles c) {
    return __builtin_ia32_vfmaddpd512_mask(a, b, c, -1, kCurrentRounding);
}
inline Floats fused(Floats a, Floats b, Floats c) {
    return __builtin_ia32_vfmaddps512_mask(a, b, c, -1, kCurrentRounding);
}
inline Doubles root(Doubles a) { return __builtin_ia32_sqrtpd512_mask(a, a, -1, kCurrentRounding); }
inline Floats root(Floats a) { return __builtin_ia32_sqrtps512_mask(a, a, -1, kCurrentRounding); }
#elif defined(__FMA__)
inline Doubles fused(Doubles a, Doubles b, Doubles c) { return __builtin_ia32_vfmaddpd256(a, b, c); }
inline Floats fused(Floats a, Floats b, Floats c) { return __builtin_ia32_vfmaddps256(a, b, c); }
inline Doubles root(Doubles a) { return __builtin_ia32_sqrtpd256(a); }
inline Floats root(Floats a) { return __builtin_ia32_sqrtps256(a); }
#endif

#if defined(__FMA__) && !defined(__clang__)
inline V fma(V a, V b, V c) { return fused(a, b, c); }
inline V sqrt(V a) { return root(a); }
#elif !defined(__clang__)
inline V fma(V a, V b, V c) {
    V r;
    for (int l = 0; l < kLanes; ++l) r[l] = std::fma(a[l], b[l], c[l]);
    return r;
}
inline V sqrt(V a) {
    return each([](T x) { return std::sqrt(x); }, a);
}
#endif

inline V magnitude(V a) {
    const M bits = M(a) & (~(M{} + (Truth(1) << (8 * sizeof(T) - 1))));
    return V(bits);
}
inline V sign(V a) { return select(a > K(0), K(1), select(a < K(0), K(-1), a)); }  // NaN, and zero, as they are
inline V maximum(V a, V b) { return select((a > b) | (a != a), a, b); }            // NaN where one is
inline V minimum(V a, V b) { return select((a < b) | (a != a), a, b); }

// Functions of PyTorch's vector code (SLEEF) where its library has them, else those of C++. Addresses of the former are
// set when the code is loaded: linking with the library would take longer than all else.
#if defined(ACA_SLEEF) && defined(__FMA__)
#define ACA_ADDRESS(name)                                        \
    extern "C" {                                                 \
    __attribute__((visibility("default"))) void* address_##name; \
    }
#define ACA_FUNCTION(name, digits) \
    ACA_ADDRESS(name)              \
    inline V name(V a) { return reinterpret_cast<V (*)(V)>(address_##name)(a); }
#define ACA_FUNCTION2(name, called, digits) \
    ACA_ADDRESS(name)                       \
    inline V name(V a, V b) { return reinterpret_cast<V (*)(V, V)>(address_##name)(a, b); }

// Those of the step control, in double precision whatever T is.
ACA_ADDRESS(exp_of_doubles)
ACA_ADDRESS(log_of_doubles)
inline Doubles call(void* address, Doubles a) { return reinterpret_cast<Doubles (*)(Doubles)>(address)(a); }
#else
#define ACA_FUNCTION(name, digits)                        \
    inline V name(V a) {                                  \
        return each([](T x) { return std::name(x); }, a); \
    }
#define ACA_FUNCTION2(name, called, digits)                            \
    inline V name(V a, V b) {                                          \
        return each([](T x, T y) { return std::called(x, y); }, a, b); \
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
inline V tanh(V x) {
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
    const M exponent = ((M(shifted) - M(shift)) + Truth((1 << (is_double ? 10 : 7)) - 1)) << kBits;
    const V power = V(exponent), e = fma(power, p, power - K(1));
    const V result = e / (e + K(2));
    return select(x < K(0), -result, select(x > K(0), result, x));  // zero and NaN as they are
}

inline V floor(V a) {
    return each([](T x) { return std::floor(x); }, a);
}
inline V ceil(V a) {
    return each([](T x) { return std::ceil(x); }, a);
}
inline V trunc(V a) {
    return each([](T x) { return std::trunc(x); }, a);
}
inline V round(V a) {  // halves to the even number
    return each([](T x) { return std::nearbyint(x); }, a);
}
inline V fmod(V a, V b) {
    return each([](T x, T y) { return std::fmod(x, y); }, a, b);
}
inline V remainder(V a, V b) {  // with the sign of b
    const auto modulo = [](T x, T y) {
        const T rest = std::fmod(x, y);
        return rest != 0 && (y < 0) != (rest < 0) ? rest + y : rest;
    };
    return each(modulo, a, b);
}

// x to the power of a constant, at most some roundings from that of the mathematical library.
inline R powers(R x, double exponent) {
#if defined(ACA_SLEEF) && defined(__FMA__)
    constexpr int kParts = sizeof(R) / sizeof(Doubles);
    Doubles part[kParts];
    std::memcpy(part, &x, sizeof x);
    for (Doubles& each : part) each = call(address_exp_of_doubles, exponent * call(address_log_of_doubles, each));
    std::memcpy(&x, part, sizeof x);
#else
    for (int l = 0; l < kLanes; ++l) x[l] = std::pow(x[l], exponent);
#endif
    return x;
}

inline V floor_divide(V a, V b) {  // as torch and Python: the whole number below, whatever the quotient rounds to
    const auto divide = [](T x, T y) {
        if (y == 0) return x / y;
        const T rest = std::fmod(x, y);
        T quotient = (x - rest) / y;
        if (rest != 0 && (y < 0) != (rest < 0)) quotient -= 1;
        if (quotient == 0) return std::copysign(T(0), x / y);
        const T whole = std::floor(quotient);
        return quotient - whole > T(0.5) ? whole + 1 : whole;
    };
    return each(divide, a, b);
}

template <int n>
inline V multiplied(V x) {  // x to the power of n
    if constexpr (n == 1) {
        return x;
    } else {
        const V half = multiplied<n / 2>(x);
        return n % 2 ? half * half * x : half * half;
    }
}

}  // namespace aca
