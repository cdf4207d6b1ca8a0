// Vectors of floats and doubles for compiled programs: the part of torch's at::vec that most kernels of Inductor need,
// with the same instructions for AVX-512. Reading torch's own headers takes longer than compiling a program with them.
#pragma once
#include <immintrin.h>

#include <cstdint>

#define C10_LIKELY(condition) (__builtin_expect(static_cast<bool>(condition), 1))
#define C10_UNLIKELY(condition) (__builtin_expect(static_cast<bool>(condition), 0))

// Functions of Sleef, which libtorch_cpu exports.
#define ACA_UNARY(of_float, of_double)          \
    extern "C" __m512 Sleef_##of_float(__m512); \
    extern "C" __m512d Sleef_##of_double(__m512d);
#define ACA_BINARY(of_float, of_double)                 \
    extern "C" __m512 Sleef_##of_float(__m512, __m512); \
    extern "C" __m512d Sleef_##of_double(__m512d, __m512d);
ACA_UNARY(expf16_u10, expd8_u10)
ACA_UNARY(expm1f16_u10, expm1d8_u10)
ACA_UNARY(logf16_u10, logd8_u10)
ACA_UNARY(log1pf16_u10, log1pd8_u10)
ACA_UNARY(log2f16_u10, log2d8_u10)
ACA_UNARY(log10f16_u10, log10d8_u10)
ACA_UNARY(sinf16_u35, sind8_u10)
ACA_UNARY(cosf16_u35, cosd8_u10)
ACA_UNARY(tanf16_u10, tand8_u10)
ACA_UNARY(asinf16_u10, asind8_u10)
ACA_UNARY(acosf16_u10, acosd8_u10)
ACA_UNARY(atanf16_u10, atand8_u10)
ACA_UNARY(asinhf16_u10, asinhd8_u10)
ACA_UNARY(atanhf16_u10, atanhd8_u10)
ACA_UNARY(tanhf16_u10, tanhd8_u10)
ACA_BINARY(powf16_u10, powd8_u10)
ACA_BINARY(atan2f16_u10, atan2d8_u10)
ACA_BINARY(copysignf16, copysignd8)
#undef ACA_UNARY
#undef ACA_BINARY

namespace at::vec {

template <typename T>
struct Vectorized;

// The result of a comparison: one bit per element.
template <typename T, int N>
struct VecMask {
    static_assert(N == 1);
    using Bits = typename Vectorized<T>::Bits;
    Bits bits;

    template <typename U, int M>
    VecMask<U, M> cast() const {
        static_assert(sizeof(U) == sizeof(T) && M == N);
        return {bits};
    }
    VecMask operator&(VecMask other) const { return {static_cast<Bits>(bits & other.bits)}; }
    VecMask operator|(VecMask other) const { return {static_cast<Bits>(bits | other.bits)}; }
    VecMask operator^(VecMask other) const { return {static_cast<Bits>(bits ^ other.bits)}; }
    VecMask operator~() const { return {static_cast<Bits>(~bits)}; }
};

// The members of Vectorized<T>: p is the suffix of intrinsics, f that of functions of Sleef.
#define ACA_VECTOR(T, REGISTER, BITS, COUNT, p, f, SINES)                                                    \
    using value_type = T;                                                                                    \
    using Bits = BITS;                                                                                       \
    using Mask = VecMask<T, 1>;                                                                              \
    REGISTER values;                                                                                         \
    static constexpr int size() { return COUNT; }                                                            \
    Vectorized() : values(_mm512_setzero_##p()) {}                                                           \
    Vectorized(REGISTER v) : values(v) {}                                                                    \
    Vectorized(T x) : values(_mm512_set1_##p(x)) {}                                                          \
    static Bits first(int64_t count) { return static_cast<Bits>((1ULL << count) - 1); }                      \
    static Vectorized loadu(const void* from, int64_t count = COUNT) {                                       \
        return count == COUNT ? _mm512_loadu_##p(from) : _mm512_maskz_loadu_##p(first(count), from);         \
    }                                                                                                        \
    void store(void* to, int64_t count = COUNT) const {                                                      \
        if (count == COUNT)                                                                                  \
            _mm512_storeu_##p(to, values);                                                                   \
        else if (count > 0)                                                                                  \
            _mm512_mask_storeu_##p(to, first(count), values);                                                \
    }                                                                                                        \
    static Vectorized blendv(Vectorized a, Vectorized b, Mask mask) {                                        \
        return _mm512_mask_blend_##p(mask.bits, a.values, b.values);                                         \
    }                                                                                                        \
    static Vectorized set(Vectorized a, Vectorized b, int64_t count = COUNT) {                               \
        return count == COUNT ? b.values : _mm512_mask_blend_##p(first(count), a.values, b.values);          \
    }                                                                                                        \
    Vectorized abs() const { return _mm512_andnot_##p(_mm512_set1_##p(T(-0.0)), values); }                   \
    Vectorized neg() const { return _mm512_xor_##p(_mm512_set1_##p(T(-0.0)), values); }                      \
    Vectorized sqrt() const { return _mm512_sqrt_##p(values); }                                              \
    Vectorized floor() const { return _mm512_floor_##p(values); }                                            \
    Vectorized ceil() const { return _mm512_ceil_##p(values); }                                              \
    Vectorized reciprocal() const { return _mm512_div_##p(_mm512_set1_##p(1), values); }                     \
    Vectorized rsqrt() const { return _mm512_div_##p(_mm512_set1_##p(1), _mm512_sqrt_##p(values)); }         \
    Vectorized exp() const { return Sleef_exp##f##_u10(values); }                                            \
    Vectorized expm1() const { return Sleef_expm1##f##_u10(values); }                                        \
    Vectorized log() const { return Sleef_log##f##_u10(values); }                                            \
    Vectorized log1p() const { return Sleef_log1p##f##_u10(values); }                                        \
    Vectorized log2() const { return Sleef_log2##f##_u10(values); }                                          \
    Vectorized log10() const { return Sleef_log10##f##_u10(values); }                                        \
    Vectorized sin() const { return Sleef_sin##f##SINES(values); }                                           \
    Vectorized cos() const { return Sleef_cos##f##SINES(values); }                                           \
    Vectorized tan() const { return Sleef_tan##f##_u10(values); }                                            \
    Vectorized asin() const { return Sleef_asin##f##_u10(values); }                                          \
    Vectorized acos() const { return Sleef_acos##f##_u10(values); }                                          \
    Vectorized atan() const { return Sleef_atan##f##_u10(values); }                                          \
    Vectorized asinh() const { return Sleef_asinh##f##_u10(values); }                                        \
    Vectorized atanh() const { return Sleef_atanh##f##_u10(values); }                                        \
    Vectorized tanh() const { return Sleef_tanh##f##_u10(values); }                                          \
    Vectorized pow(Vectorized b) const { return Sleef_pow##f##_u10(values, b.values); }                      \
    Vectorized atan2(Vectorized b) const { return Sleef_atan2##f##_u10(values, b.values); }                  \
    Vectorized copysign(Vectorized b) const { return Sleef_copysign##f(values, b.values); }                  \
    friend Vectorized operator+(Vectorized a, Vectorized b) { return _mm512_add_##p(a.values, b.values); }   \
    friend Vectorized operator-(Vectorized a, Vectorized b) { return _mm512_sub_##p(a.values, b.values); }   \
    friend Vectorized operator*(Vectorized a, Vectorized b) { return _mm512_mul_##p(a.values, b.values); }   \
    friend Vectorized operator/(Vectorized a, Vectorized b) { return _mm512_div_##p(a.values, b.values); }   \
    Mask operator==(Vectorized b) const { return {_mm512_cmp_##p##_mask(values, b.values, _CMP_EQ_OQ)}; }    \
    Mask operator!=(Vectorized b) const { return {_mm512_cmp_##p##_mask(values, b.values, _CMP_NEQ_UQ)}; }   \
    Mask operator<(Vectorized b) const { return {_mm512_cmp_##p##_mask(values, b.values, _CMP_LT_OQ)}; }     \
    Mask operator<=(Vectorized b) const { return {_mm512_cmp_##p##_mask(values, b.values, _CMP_LE_OQ)}; }    \
    Mask operator>(Vectorized b) const { return {_mm512_cmp_##p##_mask(values, b.values, _CMP_GT_OQ)}; }     \
    Mask operator>=(Vectorized b) const { return {_mm512_cmp_##p##_mask(values, b.values, _CMP_GE_OQ)}; }    \
    Mask is_nan_with(Vectorized b) const { return {_mm512_cmp_##p##_mask(values, b.values, _CMP_UNORD_Q)}; } \
    Vectorized larger(Vectorized b) const { return _mm512_max_##p(values, b.values); }                       \
    Vectorized smaller(Vectorized b) const { return _mm512_min_##p(values, b.values); }

template <>
struct Vectorized<float> {
    ACA_VECTOR(float, __m512, __mmask16, 16, ps, f16, _u35)
};

template <>
struct Vectorized<double> {
    ACA_VECTOR(double, __m512d, __mmask8, 8, pd, d8, _u10)
};
#undef ACA_VECTOR

// NaN if an operand is NaN.
template <typename T>
Vectorized<T> or_nan(Vectorized<T> a, Vectorized<T> b, Vectorized<T> x) {
    return Vectorized<T>::blendv(x, Vectorized<T>(static_cast<T>(__builtin_nan(""))), a.is_nan_with(b));
}
template <typename T>
Vectorized<T> maximum(Vectorized<T> a, Vectorized<T> b) {
    return or_nan(a, b, a.larger(b));
}
template <typename T>
Vectorized<T> minimum(Vectorized<T> a, Vectorized<T> b) {
    return or_nan(a, b, a.smaller(b));
}
template <typename T>
Vectorized<T> clamp_min(Vectorized<T> a, Vectorized<T> least) {
    return least.larger(a);
}
template <typename T>
Vectorized<T> clamp_max(Vectorized<T> a, Vectorized<T> most) {
    return most.smaller(a);
}

// Two vectors of doubles, of as many elements as a vector of floats.
template <typename T, int N>
struct VectorizedN {
    static_assert(N == 2 && sizeof(T) == 8);
    Vectorized<T> low, high;

    VectorizedN(T x) : low(x), high(x) {}
    VectorizedN(Vectorized<T> low, Vectorized<T> high) : low(low), high(high) {}
    static VectorizedN loadu(const T* from, int64_t count = 2 * Vectorized<T>::size()) {
        constexpr int64_t half = Vectorized<T>::size();
        return {Vectorized<T>::loadu(from, count < half ? count : half),
                Vectorized<T>::loadu(from + half, count < half ? 0 : count - half)};
    }
    void store(T* to, int64_t count = 2 * Vectorized<T>::size()) const {
        constexpr int64_t half = Vectorized<T>::size();
        low.store(to, count < half ? count : half);
        high.store(to + half, count < half ? 0 : count - half);
    }
    static VectorizedN set(VectorizedN a, VectorizedN b, int64_t count) {
        constexpr int64_t half = Vectorized<T>::size();
        return {Vectorized<T>::set(a.low, b.low, count < half ? count : half),
                Vectorized<T>::set(a.high, b.high, count < half ? 0 : count - half)};
    }
    friend VectorizedN operator+(VectorizedN a, VectorizedN b) { return {a.low + b.low, a.high + b.high}; }
    friend VectorizedN operator-(VectorizedN a, VectorizedN b) { return {a.low - b.low, a.high - b.high}; }
    friend VectorizedN operator*(VectorizedN a, VectorizedN b) { return {a.low * b.low, a.high * b.high}; }
    friend VectorizedN operator/(VectorizedN a, VectorizedN b) { return {a.low / b.low, a.high / b.high}; }
};

template <typename T, int N, typename U, int M>
VectorizedN<T, N> convert(Vectorized<U> x) {
    static_assert(N == 2 && M == 1 && sizeof(T) == 2 * sizeof(U));
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(x.values)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.values, 1))};
}

inline double reduced(Vectorized<double> x, Vectorized<double> (*combine)(Vectorized<double>&, Vectorized<double>&)) {
    double each[8];
    x.store(each);
    for (int i = 1; i < 8; ++i) {
        Vectorized<double> next(each[i]);
        x = combine(x, next);
    }
    x.store(each);
    return each[0];
}
inline float reduced(Vectorized<float> x, Vectorized<float> (*combine)(Vectorized<float>&, Vectorized<float>&)) {
    Vectorized<float> other = _mm512_shuffle_f32x4(x.values, x.values, 0x4E);
    x = combine(x, other);
    other = _mm512_shuffle_f32x4(x.values, x.values, 0xB1);
    x = combine(x, other);
    other = _mm512_shuffle_ps(x.values, x.values, 0x4E);
    x = combine(x, other);
    other = _mm512_shuffle_ps(x.values, x.values, 0xB1);
    x = combine(x, other);
    return _mm512_cvtss_f32(x.values);
}

// The elements of a vector combined in torch's order.
template <typename T, int N, typename Combine>
T vec_reduce_all(const Combine& combine, Vectorized<T> x) {
    return reduced(x, combine);
}
template <typename T, int N, typename Combine>
T vec_reduce_all(const Combine& combine, VectorizedN<T, N> x) {
    return reduced(combine(x.low, x.high), combine);
}

}  // namespace at::vec

template <typename V>
V sum_masked_reduce(V a, V b, int64_t count) {
    return V::set(a, a + b, count);
}
