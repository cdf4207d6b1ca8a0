// Sums over the elements of states for compiled programs, whose number of elements is known to the compiler.
// A body is a lambda with a template parameter V: body.template operator()<V>(i) takes the elements from i on that V
// holds. Elements are taken in the longest vectors that still fit, down to vectors of one element.
#pragma once
#include "registers.h"

namespace aca {

template <typename V, typename T>
inline V load(const T* from) {
    V v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}

template <typename V, typename T>
inline void store(T* to, const V& v) {
    __builtin_memcpy(to, &v, sizeof v);
}

template <typename T, long FROM, long TO, int THREADS, long COUNT = kVectorBytes / sizeof(T), typename Body>
inline void for_each_element(const Body& body) {
    using V = typename VectorOf<T, COUNT>::Type;
    constexpr long END = FROM + (TO - FROM) / COUNT * COUNT;
    if constexpr (THREADS > 1) {
#pragma omp parallel for num_threads(THREADS) schedule(static)
        for (long i = FROM; i < END; i += COUNT) body.template operator()<V>(i);
    } else {
        for (long i = FROM; i < END; i += COUNT) body.template operator()<V>(i);
    }
    if constexpr (END < TO) for_each_element<T, END, TO, 1, COUNT / 2>(body);
}

// Sum of the squares of what the body returns, in double precision and in a fixed order.
template <typename T, long FROM, long TO, long COUNT = kVectorBytes / sizeof(double), typename Body>
inline double sum_of_squares(const Body& body) {
    using V = typename VectorOf<T, COUNT>::Type;
    using Sum = typename VectorOf<double, COUNT>::Type;
    constexpr long END = FROM + (TO - FROM) / COUNT * COUNT;
    Sum sum{};
    for (long i = FROM; i < END; i += COUNT) {
        const Sum x = __builtin_convertvector(body.template operator()<V>(i), Sum);
        sum += x * x;
    }
    const double total = sum_of<double, COUNT>(sum);
    if constexpr (END < TO) return total + sum_of_squares<T, END, TO, COUNT / 2>(body);
    return total;
}

template <typename V>
inline V magnitude(V x) {
    return x < 0 ? -x : x;
}

}  // namespace aca
