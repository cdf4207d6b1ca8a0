// Objects in one piece of memory, which may grow. <vector> would take a tenth of the time of a compilation.
#pragma once
#include <cstddef>

namespace aca {

template <typename Object>
class Array {
  public:
    explicit Array(size_t size = 0) : objects_(new Object[size]()), size_(size), room_(size) {}
    Array(const Array&) = delete;
    ~Array() { delete[] objects_; }

    size_t size() const { return size_; }
    Object& operator[](size_t i) { return objects_[i]; }
    const Object& operator[](size_t i) const { return objects_[i]; }
    Object* begin() { return objects_; }
    Object* end() { return objects_ + size_; }

    // Adds an object to the end.
    Object& add() {
        if (size_ == room_) grow();
        return objects_[size_++];
    }

    void clear() {
        delete[] objects_;
        objects_ = nullptr;
        size_ = room_ = 0;
    }

  private:
    void grow() {
        const size_t room = room_ ? 2 * room_ : 4;
        Object* const objects = new Object[room]();
        for (size_t i = 0; i < size_; ++i) objects[i] = objects_[i];
        delete[] objects_;
        objects_ = objects;
        room_ = room;
    }

    Object* objects_;
    size_t size_, room_;
};

}  // namespace aca
