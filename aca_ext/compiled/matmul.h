// Matrix products for compiled programs: every size and stride is known to the compiler, and no call is dispatched.
// a is (M, K), b is (K, N), c is (M, N); element (i, j) of a lies at a[i * SAM + j * SAK], and so on.
#pragma once
#include <cstdlib>
#include <cstring>

namespace aca {

template <typename T>
struct Lanes {
    typedef T Vector __attribute__((vector_size(64)));
    typedef T Half __attribute__((vector_size(32)));
    static constexpr long count = 64 / sizeof(T);
};

template <typename T>
inline T sum_of_lanes(const typename Lanes<T>::Vector& v) {
    typename Lanes<T>::Half low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    low += high;
    T total = 0;
    for (long i = 0; i < Lanes<T>::count / 2; ++i) total += low[i];
    return total;
}

// A block of ROWS rows and COLUMNS vectors of c, held in registers; b is contiguous along n, full vectors throughout.
template <typename T, long ROWS, long COLUMNS, long N, long K, long SAM, long SAK, long LDB, long SCM, long SCN>
inline void block(const T* a, const T* b, T* c, long n) {
    using V = typename Lanes<T>::Vector;
    constexpr long L = Lanes<T>::count;
    V sum[ROWS][COLUMNS] = {};
    for (long k = 0; k < K; ++k) {
        V row[COLUMNS];
        for (long j = 0; j < COLUMNS; ++j) std::memcpy(&row[j], b + k * LDB + j * L, sizeof(V));
#pragma GCC unroll 8
        for (long i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
            for (long j = 0; j < COLUMNS; ++j) sum[i][j] += a[i * SAM + k * SAK] * row[j];
    }
    for (long i = 0; i < ROWS; ++i)
        for (long j = 0; j < COLUMNS; ++j) {
            const long left = N - n - j * L;
            T* const to = c + i * SCM + j * L * SCN;
            if (SCN == 1 && left >= L)
                std::memcpy(to, &sum[i][j], sizeof(V));
            else
                for (long lane = 0; lane < L && lane < left; ++lane) to[lane * SCN] = sum[i][j][lane];
        }
}

template <typename T, long COLUMNS, long M, long N, long K, long SAM, long SAK, long LDB, long SCM, long SCN>
inline void columns(const T* a, const T* b, T* c, long n) {
    constexpr long ROWS = M < 8 ? M : 8;
    long m = 0;
    for (; m <= M - ROWS; m += ROWS)
        block<T, ROWS, COLUMNS, N, K, SAM, SAK, LDB, SCM, SCN>(a + m * SAM, b + n, c + m * SCM + n * SCN, n);
    constexpr long LEFT = M % ROWS;
    if constexpr (LEFT != 0)
        block<T, LEFT, COLUMNS, N, K, SAM, SAK, LDB, SCM, SCN>(a + m * SAM, b + n, c + m * SCM + n * SCN, n);
}

// Memory for a copy of an operand: on the stack, or where that is too large for it on the heap.
template <typename T, long SIZE>
struct Copy {
    static constexpr bool on_heap = SIZE * sizeof(T) > (1 << 17);
    alignas(64) T values[on_heap ? 1 : SIZE];
    T* const start = on_heap ? static_cast<T*>(std::aligned_alloc(64, (SIZE * sizeof(T) + 63) / 64 * 64)) : values;
    ~Copy() {
        if (on_heap) std::free(start);
    }
};

// Vectors along n.
template <typename T, long M, long N, long K, long SAM, long SAK, long SBK, long SBN, long SCM, long SCN>
inline void along_n(const T* a, const T* b, T* c) {
    constexpr long L = Lanes<T>::count, WIDTH = (N + L - 1) / L * L;
    constexpr bool PACK = SBN != 1 || N != WIDTH;
    constexpr long LDB = PACK ? WIDTH : SBK;
    Copy<T, PACK ? K * WIDTH : 1> copy;
    if (PACK) {
        T* const packed = copy.start;
        for (long k = 0; k < K; ++k) {
            for (long n = 0; n < N; ++n) packed[k * WIDTH + n] = b[k * SBK + n * SBN];
            for (long n = N; n < WIDTH; ++n) packed[k * WIDTH + n] = 0;
        }
        b = packed;
    }
    long n = 0;
    for (; n + 2 * L <= WIDTH; n += 2 * L) columns<T, 2, M, N, K, SAM, SAK, LDB, SCM, SCN>(a, b, c, n);
    if (n < WIDTH) columns<T, 1, M, N, K, SAM, SAK, LDB, SCM, SCN>(a, b, c, n);
}

// Vectors along k: for few columns, of which each is a dot product.
template <typename T, long M, long N, long K, long SAM, long SBK, long SBN, long SCM, long SCN>
inline void along_k(const T* a, const T* b, T* c) {
    using V = typename Lanes<T>::Vector;
    constexpr long L = Lanes<T>::count, FULL = K / L * L;
    constexpr bool PACK = SBK != 1;
    constexpr long LDB = PACK ? K : SBN;
    Copy<T, PACK ? N * K : 1> copy;
    if (PACK) {
        T* const packed = copy.start;
        for (long n = 0; n < N; ++n)
            for (long k = 0; k < K; ++k) packed[n * K + k] = b[k * SBK + n * SBN];
        b = packed;
    }
    for (long m = 0; m < M; ++m) {
        V sum[N] = {};
        for (long k = 0; k < FULL; k += L) {
            V x, y;
            std::memcpy(&x, a + m * SAM + k, sizeof x);
#pragma GCC unroll 16
            for (long n = 0; n < N; ++n) {
                std::memcpy(&y, b + n * LDB + k, sizeof y);
                sum[n] += x * y;
            }
        }
#pragma GCC unroll 16
        for (long n = 0; n < N; ++n) {
            T total = sum_of_lanes<T>(sum[n]);
            for (long k = FULL; k < K; ++k) total += a[m * SAM + k] * b[n * LDB + k];
            c[m * SCM + n * SCN] = total;
        }
    }
}

template <typename T, long M, long N, long K, long SAM, long SAK, long SBK, long SBN, long SCM, long SCN>
inline void matmul(const T* a, const T* b, T* c) {
    constexpr long L = Lanes<T>::count;
    if constexpr (N < L && SAK == 1 && K >= L)
        along_k<T, M, N, K, SAM, SBK, SBN, SCM, SCN>(a, b, c);
    else if constexpr (N >= L || N >= M)
        along_n<T, M, N, K, SAM, SAK, SBK, SBN, SCM, SCN>(a, b, c);
    else  // the transposed product: vectors along m
        along_n<T, N, M, K, SBN, SBK, SAK, SAM, SCN, SCM>(b, a, c);
}

}  // namespace aca
