// Iterations of Newton's method for the stages of an implicit step, without a return to Python between func, the
// correction and the size of its change.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "python/error_norm.h"
#include "python/slope_function.h"
#include "python/stage_system.h"

namespace aca {

class StageIterations {
  public:
    // `like` has the layout of the states, and `allocate()` returns tuples of tensors in that layout. `norm` is as for
    // ErrorNorm.
    StageIterations(const BoundTarget& on, int64_t n, const py::object& like, const py::object& allocate,
                    const py::tuple& norm)
        : on_(on), n_(n), norm_(on, n, norm), admission_(like), states_(allocate), copies_(allocate) {}

    // An iteration from `z`, with f at the times `t` and at the states base + z. Returns the next z and the size of its
    // change, the largest of all stages: by the norm with the scale of `y` and the states or, if `y` is None, as
    // (of_element, of_largest) of RelativeChanges.
    py::tuple iterate(StageSystem& system, const py::object& f, const py::sequence& t, const py::sequence& base,
                      const py::sequence& z, const py::object& y) {
        if (system.n_elements() != n_) throw std::invalid_argument("the system is one of other states");
        Slope* const slope = py::isinstance<Slope>(f) ? f.cast<Slope*>() : nullptr;
        std::vector<Row> held;  // until the end of the iteration
        Addresses old, states, slopes, next, change;
        const auto copy = [&](Addresses& to) {
            held.push_back(copies_.take());
            return to.emplace_back(check_memory(held.back().address));
        };
        py::list corrected;
        for (size_t i = 0; i < z.size(); ++i) {
            old.push_back(admitted(z[i]));
            const Row state = states_.take_one();
            states.push_back(check_memory(state.address));
            add(state.address, admitted(base[i]), old[i]);
            held.push_back(state);
            // Copied, since func may return one buffer for all stages.
            const Slope::Result k = slope_at(f, slope, py::object(t[i]).ptr(), state.tensor.ptr(), state.address);
            add(copy(slopes), 0, check_memory(k.address));
            copy(change);
            copy(next);
            corrected.append(held.back().tensor);
        }
        system.correct(slopes, old, next, change);
        const py::object size = y.is_none() ? relative(change, states) : norm(change, states, admitted(y));
        return py::make_tuple(std::move(corrected), size);
    }

  private:
    static uintptr_t check_memory(uintptr_t address) {
        if (address < kLowestAddress) refuse_without_memory();
        return address;
    }

    uintptr_t admitted(const py::object& x) const {
        uintptr_t address;
        if (!admission_.admits(x.ptr(), &address))
            throw std::invalid_argument("a tensor is not laid out like the state");
        return check_memory(address ? address : address_of(x));
    }

    // out = base + x, with 0 for a base without address.
    void add(uintptr_t out, uintptr_t base, uintptr_t x) const {
        Sum one{};
        one.count = 1, one.x[0] = x, one.w[0] = 1;
        run(n_, [&] { on_.backend->weighted_sum(on_.target, n_, out, base, 1, one); });
    }

    py::object norm(const Addresses& change, const Addresses& states, uintptr_t y) const {
        double size = norm_(change[0], 0, 0, y, states[0]);
        for (size_t i = 1; i < change.size(); ++i) size = std::max(size, norm_(change[i], 0, 0, y, states[i]));
        return py::float_(size);
    }

    py::object relative(const Addresses& change, const Addresses& states) const {
        RelativeChanges size = relative_changes_at(on_.target.dtype, n_, change[0], states[0]);
        for (size_t i = 1; i < change.size(); ++i) {
            const RelativeChanges other = relative_changes_at(on_.target.dtype, n_, change[i], states[i]);
            size.of_element = std::max(size.of_element, other.of_element);
            size.of_largest = std::max(size.of_largest, other.of_largest);
        }
        return py::make_tuple(size.of_element, size.of_largest);
    }

    const BoundTarget on_;
    const int64_t n_;
    ErrorNorm norm_;
    Admission admission_;
    Rows states_;
    Copies copies_;
};

}  // namespace aca
