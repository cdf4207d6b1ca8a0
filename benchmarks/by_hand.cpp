// A loop over SIMD lanes that solves one system of small problems by dopri5, written by hand: what is possible. T, L
// and the name of the SYSTEM are defined by whoever compiles it. The outputs are evenly spaced; there is no gradient.
#include <algorithm>
#include <cmath>

typedef T V __attribute__((vector_size(L * sizeof(T))));

struct LotkaVolterra {
    static constexpr int n = 2, parameters = 4;
    static void slope(const V* y, const V* p, V* k) {
        k[0] = p[0] * y[0] - p[1] * y[0] * y[1];
        k[1] = p[2] * y[0] * y[1] - p[3] * y[1];
    }
};

struct VanDerPol {
    static constexpr int n = 2, parameters = 1;
    static void slope(const V* y, const V* p, V* k) {
        k[0] = y[1];
        k[1] = p[0] * (1 - y[0] * y[0]) * y[1] - y[0];
    }
};

struct Lorenz {
    static constexpr int n = 3, parameters = 1;
    static void slope(const V* y, const V* p, V* k) {
        k[0] = T(10) * (y[1] - y[0]);
        k[1] = y[0] * (p[0] - y[2]) - y[1];
        k[2] = y[0] * y[1] - T(8. / 3) * y[2];
    }
};

using System = SYSTEM;

const T A[7][6] = {{},
                   {T(1. / 5)},
                   {T(3. / 40), T(9. / 40)},
                   {T(44. / 45), T(-56. / 15), T(32. / 9)},
                   {T(19372. / 6561), T(-25360. / 2187), T(64448. / 6561), T(-212. / 729)},
                   {T(9017. / 3168), T(-355. / 33), T(46732. / 5247), T(49. / 176), T(-5103. / 18656)},
                   {T(35. / 384), T(0), T(500. / 1113), T(125. / 192), T(-2187. / 6784), T(11. / 84)}};
const T E[7] = {T(71. / 57600), T(0), T(-71. / 16695), T(71. / 1920), T(-17253. / 339200), T(22. / 525), T(-1. / 40)};

// y(theta) between y0 and y1 by the cubic polynomial of their values and slopes.
static T cubic(T theta, T h, T y0, T y1, T k0, T k1) {
    return y0 + theta * (y1 - y0) +
           theta * (theta - 1) * ((1 - 2 * theta) * (y1 - y0) + (theta - 1) * h * k0 + theta * h * k1);
}

// Rows of y0 and p belong to samples, `out` has (n_times, samples, n) numbers. Returns the steps tried.
extern "C" long solve(long samples, const T* y0, const T* p0, double end, long n_times, double tolerance,
                      double first_step, T* out) {
    constexpr int n = System::n, m = System::parameters;
    const T tol = T(tolerance);
    V y[n], y1[n], p[m], k[7][n];
    double t[L], h[L], used[L];
    long id[L], due[L], next = 0, live = 0, steps = 0;
    bool on[L];
    const auto load = [&](int l) {
        on[l] = next < samples;
        const long row = on[l] ? next++ : 0;
        id[l] = row, t[l] = 0, h[l] = first_step, due[l] = 1;
        for (int c = 0; c < n; ++c) y[c][l] = y0[row * n + c];
        for (int c = 0; c < m; ++c) p[c][l] = p0[row * m + c];
        if (on[l]) std::copy(y0 + row * n, y0 + row * n + n, out + row * n);
        return on[l];
    };
    for (int l = 0; l < L; ++l) live += load(l);
    System::slope(y, p, k[0]);
    while (live > 0) {
        steps += live;
        V step;
        for (int l = 0; l < L; ++l) used[l] = on[l] ? std::min(h[l], end - t[l]) : 0, step[l] = T(used[l]);
        for (int i = 1; i < 7; ++i) {
            for (int c = 0; c < n; ++c) {
                V sum = A[i][0] * k[0][c];
                for (int j = 1; j < i; ++j) sum += A[i][j] * k[j][c];
                y1[c] = y[c] + step * sum;
            }
            System::slope(y1, p, k[i]);
        }
        V sum{};
        for (int c = 0; c < n; ++c) {
            V error = E[0] * k[0][c];
            for (int i = 2; i < 7; ++i) error += E[i] * k[i][c];
            const V before = y[c] < 0 ? -y[c] : y[c], after = y1[c] < 0 ? -y1[c] : y1[c];
            const V ratio = step * error / (tol + tol * (before > after ? before : after));
            sum += ratio * ratio;
        }
        bool is_fresh = false;
        for (int l = 0; l < L; ++l) {
            if (!on[l]) continue;
            const double square = std::max(double(sum[l]) / n, 1e-20);
            const double factor = std::min(10., std::max(.2, .9 * std::pow(square, -.1)));
            h[l] = used[l] * (square <= 1 ? std::max(1., factor) : std::min(1., factor));
            if (!(square <= 1)) continue;
            const double start = t[l];
            t[l] = used[l] == end - start ? end : start + used[l];
            for (; due[l] < n_times && end * double(due[l]) / double(n_times - 1) <= t[l]; ++due[l]) {
                const T theta = T((end * double(due[l]) / double(n_times - 1) - start) / used[l]);
                T* const row = out + (due[l] * samples + id[l]) * n;
                for (int c = 0; c < n; ++c)
                    row[c] = cubic(theta, T(used[l]), y[c][l], y1[c][l], k[0][c][l], k[6][c][l]);
            }
            for (int c = 0; c < n; ++c) y[c][l] = y1[c][l], k[0][c][l] = k[6][c][l];
            if (t[l] == end) {
                live -= !load(l);
                is_fresh = true;
            }
        }
        if (is_fresh) System::slope(y, p, k[0]);
    }
    return steps;
}
