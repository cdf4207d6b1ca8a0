// Python's tensors as the steps see them: attributes, addresses, and rows allocated many at a time.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <utility>

namespace aca {

namespace py = pybind11;

constexpr int64_t kReleaseGilAbove = 1 << 14;  // elements; below, releasing costs more than it gives

template <typename F>
void run(int64_t n, F&& f) {
    if (n < 0) throw std::invalid_argument("n must not be negative");
    if (n > kReleaseGilAbove) {
        const py::gil_scoped_release release;
        f();
    } else {
        f();
    }
}

// The attribute of a tensor, without the temporary string that a literal would make.
class Attribute {
  public:
    explicit Attribute(const char* name) : name_(PyUnicode_InternFromString(name)) {}
    py::object of(PyObject* x) const { return owned(PyObject_GetAttr(x, name_)); }
    py::object call(PyObject* x) const { return owned(PyObject_VectorcallMethod(name_, &x, 1, nullptr)); }

    static py::object owned(PyObject* result) {
        if (!result) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(result);
    }

  private:
    PyObject* name_;
};

inline uintptr_t address_of(const py::object& tensor) {
    static const Attribute data_ptr("data_ptr");
    return uintptr_t(PyLong_AsSize_t(data_ptr.call(tensor.ptr()).ptr()));
}

// A tensor and where its elements are.
struct Row {
    py::object tensor;
    uintptr_t address;
};

// Tensors of one layout, handed out one after another and allocated many at a time. None is handed out twice.
class Rows {
  public:
    // `allocate()` returns a tuple of tensors, equally far apart in memory.
    explicit Rows(py::object allocate) : allocate_(std::move(allocate)) {}

    // `count` neighbours; operator[] and address() then speak of them.
    void take(size_t count) {
        first_ += taken_;
        taken_ = count;
        if (block_ && first_ + count <= size_) return;
        block_ = allocate_();
        first_ = 0;
        size_ = size_t(PyTuple_GET_SIZE(block_.ptr()));
        if (size_ < count) throw std::invalid_argument("allocate() returned too few tensors");
        start_ = address_of((*this)[0]);
        pitch_ = size_ > 1 ? address_of((*this)[1]) - start_ : 0;
    }
    py::object operator[](size_t i) const {
        return py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(block_.ptr(), Py_ssize_t(first_ + i)));
    }
    uintptr_t address() const { return start_ + first_ * pitch_; }

    // The next one alone; its block is let go with its last one.
    Row take_one() {
        take(1);
        Row row{(*this)[0], address()};
        if (first_ + 1 == size_) block_ = py::object();
        return row;
    }

  private:
    py::object allocate_, block_;
    size_t first_ = 0, taken_ = 0, size_ = 0;
    uintptr_t start_ = 0, pitch_ = 0;
};

}  // namespace aca
