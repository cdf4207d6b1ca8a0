// Memory and layout of a tensor without a call into Python and without libtorch: by torch's exchange functions of
// DLPack 1.x, whose specification is at dmlc.github.io/dlpack.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "python/attributes.h"

namespace aca {

namespace py = pybind11;

namespace dlpack {

struct Tensor {
    void* data;
    struct Device {
        int32_t type, id;
    } device;
    int32_t ndim;
    struct DataType {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct ExchangeApi {
    uint32_t major, minor;
    ExchangeApi* previous;
    void (*owning[3])();                     // allocate, export, import
    int (*view)(void* object, Tensor* out);  // borrows until control returns; -1 with a Python exception set
    int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace dlpack

// Functions of the torch that is loaded; null if its version lacks them.
struct Torch {
    int (*view)(void*, dlpack::Tensor*) = nullptr;
    PyObject* storage_uses = nullptr;  // called with the address of a storage, returns the number of its references

    static Torch& found() {
        static Torch torch;
        return torch;
    }

    // False for subclasses, which may keep their elements elsewhere.
    static bool is_plain(PyObject* x) { return TensorClasses::known().are_those_of(x); }

    // Returns false, and leaves `seen` undefined, unless `x` is a plain tensor with memory.
    bool look(PyObject* x, dlpack::Tensor* seen) const {
        if (!view || !is_plain(x)) return false;
        if (view(x, seen) != 0) {
            PyErr_Clear();
            return false;
        }
        return has_memory(x, uintptr_t(seen->data)) && seen->strides != nullptr && seen->byte_offset == 0;
    }

    // Returns true if `x` has left the memory at `address`; false if that address is 0, which stands for unknown.
    bool has_moved(PyObject* x, uintptr_t address) const {
        dlpack::Tensor now;
        return address != 0 && view && !(look(x, &now) && uintptr_t(now.data) == address);
    }

    // A tensor without memory reports its offset in its storage as its address, which is small but not always 0.
    static bool has_memory(PyObject* x, uintptr_t address) {
        constexpr uint64_t kSurelyMemory = uint64_t(1) << 40;  // larger than any offset in a storage
        if (uint64_t(address) >= kSurelyMemory) return true;
        if (address == 0) return false;
        try {  // memory of a program that is not loaded at a random address, such as that of some builds of Python
            static const Attribute offset("storage_offset"), element_size("element_size");
            return address != as_size(offset.call(x)) * as_size(element_size.call(x));
        } catch (const py::error_already_set&) {
            return false;
        }
    }
};

// Raises the exception of that name in aca_ext.errors.
[[noreturn]] inline void raise_error(const char* error, const char* message) {
    PyErr_SetString(py::module_::import("aca_ext.errors").attr(error).ptr(), message);
    throw py::error_already_set();
}

constexpr uintptr_t kLowestAddress = 1 << 12;  // operating systems map nothing below

[[noreturn]] inline void refuse_without_memory() {
    raise_error(
        "ArgumentTypeError",
        "a tensor has no memory that the kernels could read or write: it is a fake one (is a FakeTensorMode active?), "
        "or its storage was freed or resized. Use plain tensors that keep their memory.");
}

// Copy of a tensor's dtype, device, shape and strides.
class Layout {
  public:
    Layout() = default;
    explicit Layout(const dlpack::Tensor& of)
        : dtype_(of.dtype),
          device_(of.device),
          shape_(of.shape, of.shape + of.ndim),
          strides_(of.strides, of.strides + of.ndim) {}

    bool is_that_of(const dlpack::Tensor& x) const {
        return size_t(x.ndim) == shape_.size() && x.dtype.code == dtype_.code && x.dtype.bits == dtype_.bits &&
               x.dtype.lanes == dtype_.lanes && x.device.type == device_.type && x.device.id == device_.id &&
               std::equal(shape_.begin(), shape_.end(), x.shape) &&
               std::equal(strides_.begin(), strides_.end(), x.strides);
    }

  private:
    dlpack::Tensor::DataType dtype_{};
    dlpack::Tensor::Device device_{};
    std::vector<int64_t> shape_, strides_;
};

}  // namespace aca
