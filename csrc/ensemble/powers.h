// Powers of error ratios, by which the next step sizes are chosen, for all lanes at once.
#pragma once
#include "ensemble/lanes.h"

namespace aca {

template <typename To, typename From>
ACA_HD To with_bits_of(From from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// Σ c[i]·x^i of `count` terms, from halves that do not wait for one another (Estrin); x[j] is x to the power of 2^j.
template <int count>
ACA_HD Doubles sum_of_terms(const double* c, const Doubles (&x)[4]) {
    if constexpr (count == 1) {
        return c[0] - Doubles{};
    } else {
        constexpr int j = count > 8 ? 3 : count > 4 ? 2 : count > 2 ? 1 : 0, half = 1 << j;
        return fused(sum_of_terms<count - half>(c + half, x), x[j], sum_of_terms<half>(c, x));
    }
}

// Likewise, with the largest term added last, which rounds least.
template <int count>
ACA_HD Doubles series(Doubles x, const double (&c)[count]) {
    const Doubles x2 = x * x, x4 = x2 * x2;
    return fused(sum_of_terms<count - 1>(c + 1, {x, x2, x4, x4 * x4}), x, c[0] - Doubles{});
}

// x to the power of an exponent between -1 and 1, at most some roundings from that of the mathematical library, in a
// quarter of the time of SLEEF's exp and log. x is positive and finite; beyond 2^-1000 and 2^1000 it is taken for
// these, whose powers exceed all limits of a step.
ACA_HD Doubles power_of(Doubles x, double exponent) {
    constexpr double kLeast = 9.332636185032189e-302, kMost = 1.0715086071862673e301;
    constexpr double kLog[] = {1., 1. / 3, 1. / 5, 1. / 7, 1. / 9, 1. / 11, 1. / 13, 1. / 15, 1. / 17, 1. / 19};
    constexpr double kExp[] = {
        1.,        1.,         1. / 2,      1. / 6,        1. / 24,        1. / 120,       1. / 720,
        1. / 5040, 1. / 40320, 1. / 362880, 1. / 3.6288e6, 1. / 3.99168e7, 1. / 4.790016e8};
    constexpr double kLn2 = 0.693147180559945309417;
    constexpr uint64_t kRootOfHalf = 0x3fe6a09e667f3bcd, kOne = 0x3ff0000000000000;
    x = x < kLeast ? kLeast - Doubles{} : x;
    x = x > kMost ? kMost - Doubles{} : x;
    // x = 2^n·m with m from sqrt(1/2) to sqrt(2), and log(m) = 2·artanh(s)
    const Words bits = with_bits_of<Words>(x), biased = (bits - kRootOfHalf + kOne) >> 52;
    const Doubles m = with_bits_of<Doubles>(bits - (biased << 52) + kOne);
    const Doubles n = with_bits_of<Doubles>(biased | 0x4330000000000000) - (4503599627370496. + 1023);
    const Doubles s = (m - 1) / (m + 1);
    const Doubles fraction = (exponent * 2 / kLn2) * s * series(s * s, kLog);
    // exponent·log2(x) = whole + rest
    const double shift = 6755399441055744.;  // rounds to whole numbers, and shows their bits
    const Doubles exponents = exponent - Doubles{}, shifted = fused(n, exponents, fraction) + shift;
    const Doubles whole = shifted - shift, rest = fused(n, exponents, -whole) + fraction;
    const Words power_of_two = (with_bits_of<Words>(shifted) + 1023) << 52;  // whose bits above are shifted out
    return with_bits_of<Doubles>(power_of_two) * series(kLn2 * rest, kExp);
}

}  // namespace aca
