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
#ifdef __FMA__
#include <immintrin.h>
#endif

namespace aca {

constexpr int kLanes = ACA_VECTOR_BYTES / int(sizeof(T));

typedef T V __attribute__((vector_size(kLanes * sizeof(T))));
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

#if defined(__AVX512F__)
inline __m512d fused(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
inline __m512 fused(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline __m512d root(__m512d a) { return _mm512_sqrt_pd(a); }
inline __m512 root(__m512 a) { return _mm512_sqrt_ps(a); }
typedef std::conditional_t<sizeof(T) == 8, __m512d, __m512> Native;
#elif defined(__FMA__)
inline __m256d fused(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
inline __m256 fused(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256d root(__m256d a) { return _mm256_sqrt_pd(a); }
inline __m256 root(__m256 a) { return _mm256_sqrt_ps(a); }
typedef std::conditional_t<sizeof(T) == 8, __m256d, __m256> Native;
#endif

#ifdef __FMA__
inline V fma(V a, V b, V c) { return V(fused(Native(a), Native(b), Native(c))); }
inline V sqrt(V a) { return V(root(Native(a))); }
#else
inline V fma(V a, V b, V c) { return a * b + c; }
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

// Functions of PyTorch's vector code (SLEEF) where the library that holds it is linked, else those of C++.
#if defined(ACA_SLEEF) && defined(__FMA__)
#define ACA_CALL(name, lanes, digits) Sleef_##name##lanes##_##digits
#define ACA_NAME(name, lanes, digits) ACA_CALL(name, lanes, digits)
#define ACA_FUNCTION(name, digits)                               \
    extern "C" Native ACA_NAME(name, ACA_SLEEF, digits)(Native); \
    inline V name(V a) { return V(ACA_NAME(name, ACA_SLEEF, digits)(Native(a))); }
#define ACA_FUNCTION2(name, called, digits)                                \
    extern "C" Native ACA_NAME(called, ACA_SLEEF, digits)(Native, Native); \
    inline V name(V a, V b) { return V(ACA_NAME(called, ACA_SLEEF, digits)(Native(a), Native(b))); }
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
ACA_FUNCTION(tanh, u10)
ACA_FUNCTION(asinh, u10)
ACA_FUNCTION(acosh, u10)
ACA_FUNCTION(atanh, u10)
ACA_FUNCTION(erf, u10)
ACA_FUNCTION(erfc, u15)
ACA_FUNCTION2(power, pow, u10)
ACA_FUNCTION2(atan2, atan2, u10)
ACA_FUNCTION2(hypot, hypot, u05)

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
