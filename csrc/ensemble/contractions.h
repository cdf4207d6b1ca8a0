// Matrix products of a sample, and their transposes, as loops over lanes.
#pragma once
#include "ensemble/lanes.h"

namespace aca {

struct Constant {
    V value;
    ACA_HD V operator[](int) const { return value; }
    ACA_HD Constant operator+(int) const { return *this; }
};

ACA_HD V lanes_of(T x) { return K(double(x)); }
ACA_HD V lanes_of(V x) { return x; }

// Σ_j a[j·inner]·b[j·step] for some rows of a at once, so that each b is loaded once for all of them.
template <int Rows, int Columns, typename A, typename B>
ACA_HD void rows_times(V* sums, A a, int row, int inner, B b, int step) {
    for (int r = 0; r < Rows; ++r) sums[r] = lanes_of(a[r * row]) * b[0];
    ACA_LOOP
    for (int j = 1; j < Columns; ++j) {
        const V x = b[j * step];
        for (int r = 0; r < Rows; ++r) sums[r] = fma(lanes_of(a[r * row + j * inner]), x, sums[r]);
    }
}

template <int Rows, int Columns, typename Store, typename A, typename B>
ACA_HD void each_row(Store store, A a, int row, int inner, B b, int step) {
    constexpr int kBlock = 8;
    V sums[kBlock];
    int i = 0;
    ACA_LOOP
    for (; i + kBlock <= Rows; i += kBlock) {
        rows_times<kBlock, Columns>(sums, a + i * row, row, inner, b, step);
        for (int r = 0; r < kBlock; ++r) store(i + r, sums[r]);
    }
    ACA_LOOP
    for (; i < Rows; ++i) {
        rows_times<1, Columns>(sums, a + i * row, row, inner, b, step);
        store(i, sums[0]);
    }
}

// out[i] = Σ_j a[i·row + j·inner]·b[j·step]
template <int Rows, int Columns, typename A, typename B>
ACA_HD void contract(V* out, A a, int row, int inner, B b, int step) {
    each_row<Rows, Columns>([=](int i, V sum) { out[i] = sum; }, a, row, inner, b, step);
}

// out[i·distance] += Σ_j a[i·row + j·inner]·b[j·step]
template <int Rows, int Columns, typename A, typename B>
ACA_HD void contract_add(V* out, int distance, A a, int row, int inner, B b, int step) {
    each_row<Rows, Columns>([=](int i, V sum) { out[i * distance] += sum; }, a, row, inner, b, step);
}

// out[i·row + j·inner] += a[i·step_a]·b[j·step_b]
template <int Rows, int Columns, typename B>
ACA_HD void outer_add(V* out, int row, int inner, const V* a, int step_a, B b, int step_b) {
    ACA_LOOP
    for (int i = 0; i < Rows; ++i) {
        const V x = a[i * step_a];
        ACA_LOOP
        for (int j = 0; j < Columns; ++j) {
            V& to = out[i * row + j * inner];
            to = fma(x, lanes_of(b[j * step_b]), to);
        }
    }
}

}  // namespace aca
