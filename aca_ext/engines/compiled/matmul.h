// Matrix products for compiled programs: every size and stride is known to the compiler, and no call is dispatched.
// a is (M, K), b is (K, N), c is (M, N); element (i, j) of a lies at a[i * SAM + j * SAK], and so on.
#pragma once
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "registers.h"

namespace aca {

template <typename T>
struct Lanes {
    static constexpr long count = kVectorBytes / sizeof(T);
    using Vector = typename VectorOf<T, count>::Type;
};

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

// In a block, two vectors of sums for each row fill the registers.
constexpr long kBlockRows = kVectorRegisters >= 32 ? 8 : 6;

template <typename T, long COLUMNS, long M, long N, long K, long SAM, long SAK, long LDB, long SCM, long SCN>
inline void columns(const T* a, const T* b, T* c, long n) {
    constexpr long ROWS = M < kBlockRows ? M : kBlockRows;
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

// With vectors along n. `copied` elements of a copy of b make them contiguous, full and aligned; 0: b is so as it is.
template <typename T, long M, long N, long K, long SAM, long SAK, long SBK, long SBN, long SCM, long SCN>
struct AlongN {
    static constexpr long L = Lanes<T>::count, WIDTH = (N + L - 1) / L * L;
    static constexpr long copied = SBN != 1 || N != WIDTH ? K * WIDTH : 0;

    static void copy(const T* b, T* to) {
        for (long k = 0; k < K; ++k) {
            for (long n = 0; n < N; ++n) to[k * WIDTH + n] = b[k * SBK + n * SBN];
            for (long n = N; n < WIDTH; ++n) to[k * WIDTH + n] = 0;
        }
    }

    static void run(const T* a, const T* b, T* c) {
        constexpr long LDB = copied ? WIDTH : SBK;
        long n = 0;
        for (; n + 2 * L <= WIDTH; n += 2 * L) columns<T, 2, M, N, K, SAM, SAK, LDB, SCM, SCN>(a, b, c, n);
        if (n < WIDTH) columns<T, 1, M, N, K, SAM, SAK, LDB, SCM, SCN>(a, b, c, n);
    }
};

// With vectors along k, along which a is contiguous: for few columns, of which each is a dot product.
template <typename T, long M, long N, long K, long SAM, long SBK, long SBN, long SCM, long SCN>
struct AlongK {
    static constexpr long L = Lanes<T>::count, FULL = K / L * L;
    static constexpr long copied = SBK != 1 ? N * K : 0;

    static void copy(const T* b, T* to) {
        for (long n = 0; n < N; ++n)
            for (long k = 0; k < K; ++k) to[n * K + k] = b[k * SBK + n * SBN];
    }

    static void run(const T* a, const T* b, T* c) {
        using V = typename Lanes<T>::Vector;
        constexpr long LDB = copied ? K : SBN;
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
                T total = sum_of<T, L>(sum[n]);
                for (long k = FULL; k < K; ++k) total += a[m * SAM + k] * b[n * LDB + k];
                c[m * SCM + n * SCN] = total;
            }
        }
    }
};

// Products of larger matrices, with more than so many products of numbers, are those of the BLAS that torch uses: they
// need blocks that fit into caches. It reads integers of 32 bits or of 64; either finds the number in a long.
#ifdef ACA_BLAS
extern "C" {
void sgemm_(const char*, const char*, const long*, const long*, const long*, const float*, const float*, const long*,
            const float*, const long*, const float*, float*, const long*);
void dgemm_(const char*, const char*, const long*, const long*, const long*, const double*, const double*, const long*,
            const double*, const long*, const double*, double*, const long*);
}
inline constexpr auto gemm(const float*) { return sgemm_; }
inline constexpr auto gemm(const double*) { return dgemm_; }
constexpr long kLargestOwn = 1L << 20;

// Rows or columns are contiguous, and do not overlap.
constexpr bool is_blas_matrix(long rows, long columns, long of_rows, long of_columns) {
    const long length = of_rows == 1 ? rows : columns, step = of_rows == 1 ? of_columns : of_rows;
    return (of_rows == 1 || of_columns == 1) && length > 1 && step >= length && step < 1L << 31;
}

template <typename T, long M, long N, long K, long SAM, long SAK, long SBK, long SBN, long SCM, long SCN>
struct ByBlas {
    static constexpr bool fits = (M * N * K > kLargestOwn) && is_blas_matrix(M, K, SAM, SAK) &&
                                 is_blas_matrix(K, N, SBK, SBN) && is_blas_matrix(M, N, SCM, SCN);
    static constexpr long copied = 0;

    static void copy(const T*, T*) {}

    static void run(const T* a, const T* b, T* c) {
        if constexpr (SCM != 1) {  // BLAS writes matrices by columns; those of the transposed product are the rows
            ByBlas<T, N, M, K, SBN, SBK, SAK, SAM, SCN, SCM>::run(b, a, c);
        } else {
            static constexpr long m = M, n = N, k = K, step_a = SAM == 1 ? SAK : SAM, step_b = SBK == 1 ? SBN : SBK;
            static constexpr long step_c = SCN;
            static constexpr T one = 1, zero = 0;
            gemm(a)(SAM == 1 ? "N" : "T", SBK == 1 ? "N" : "T", &m, &n, &k, &one, a, &step_a, b, &step_b, &zero, c,
                    &step_c);
        }
    }
};
#else
template <typename T, long M, long N, long K, long SAM, long SAK, long SBK, long SBN, long SCM, long SCN>
struct ByBlas {
    static constexpr bool fits = false;
};
#endif

// c = a·b. Of an operand that LASTS from one product to the next, the copy is made beforehand.
template <typename T, long M, long N, long K, long SAM, long SAK, long SBK, long SBN, long SCM, long SCN, bool A_LASTS,
          bool B_LASTS>
struct Product {
    static constexpr long L = Lanes<T>::count;
    using Library = ByBlas<T, M, N, K, SAM, SAK, SBK, SBN, SCM, SCN>;
    static constexpr bool along_k = N < L && SAK == 1 && K >= L;
    static constexpr bool swapped = !Library::fits && !along_k && N < L && N < M;  // vectors along m
    using Own = std::conditional_t<along_k, AlongK<T, M, N, K, SAM, SBK, SBN, SCM, SCN>,
                                   std::conditional_t<swapped, AlongN<T, N, M, K, SBN, SBK, SAK, SAM, SCN, SCM>,
                                                      AlongN<T, M, N, K, SAM, SAK, SBK, SBN, SCM, SCN>>>;
    using Way = std::conditional_t<Library::fits, Library, Own>;
    static constexpr bool is_prepared = Way::copied && (swapped ? A_LASTS : B_LASTS);
    static constexpr long prepared_bytes = is_prepared ? (Way::copied * long(sizeof(T)) + 63) / 64 * 64 : 0;

    static void prepare(const T* a, const T* b, char* to) {
        if constexpr (is_prepared) Way::copy(swapped ? a : b, reinterpret_cast<T*>(to));
    }

    static void run(const T* a, const T* b, T* c, const char* prepared) {
        if (swapped) std::swap(a, b);
        if constexpr (is_prepared) {
            Way::run(a, reinterpret_cast<const T*>(prepared), c);
        } else if constexpr (Way::copied) {
            Copy<T, Way::copied> copy;
            Way::copy(b, copy.start);
            Way::run(a, copy.start, c);
        } else {
            Way::run(a, b, c);
        }
    }
};

}  // namespace aca
