// A Gloo transport whose waiting operations can be woken from another thread.
#pragma once

#include <gloo/common/error.h>
#include <gloo/transport/context.h>
#include <gloo/transport/device.h>
#include <gloo/transport/tcp/device.h>
#include <gloo/transport/unbound_buffer.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace pollen {

using Milliseconds = std::chrono::milliseconds;
using gloo::transport::UnboundBuffer;

// Wraps Gloo's TCP transport so that abort() can wake a waiting operation: Gloo itself does so
// only if the transfer has not begun, and a peer that dies in the middle of one would block it
// until the timeout.
class Mesh final : public gloo::transport::Context, public std::enable_shared_from_this<Mesh> {
 public:
  Mesh(std::shared_ptr<Context> inner, int rank, int size)
      : Context(rank, size), inner_(std::move(inner)) {}

  std::unique_ptr<gloo::transport::Pair>& getPair(int rank) override {
    return inner_->getPair(rank);
  }
  std::unique_ptr<gloo::transport::Pair>& createPair(int rank) override {
    inner_->setTimeout(getTimeout());
    return inner_->createPair(rank);
  }
  std::unique_ptr<UnboundBuffer> createUnboundBuffer(void* data, size_t size) override {
    auto inner = inner_->createUnboundBuffer(data, size);
    return std::unique_ptr<UnboundBuffer>(new Buffer(shared_from_this(), std::move(inner)));
  }

  void abort(const std::string& reason) {
    std::lock_guard<std::mutex> guard(lock_);
    if (!aborted_) reason_ = reason;
    aborted_ = true;
    for (auto* buffer : buffers_) {
      buffer->abortWaitRecv();
      buffer->abortWaitSend();
    }
    for (int peer = 0; peer < size; peer++) {
      if (peer != rank && getPair(peer)) getPair(peer)->close();
    }
  }

 private:
  class Buffer final : public UnboundBuffer {
   public:
    Buffer(std::shared_ptr<Mesh> mesh, std::unique_ptr<UnboundBuffer> inner)
        : UnboundBuffer(inner->ptr, inner->size), mesh_(std::move(mesh)), inner_(std::move(inner)) {
      std::lock_guard<std::mutex> guard(mesh_->lock_);
      mesh_->buffers_.insert(inner_.get());
    }
    ~Buffer() override {
      std::lock_guard<std::mutex> guard(mesh_->lock_);
      mesh_->buffers_.erase(inner_.get());
    }
    bool waitRecv(int* rank, Milliseconds limit) override {
      return mesh_->unless_aborted([&] { return inner_->waitRecv(rank, limit); });
    }
    bool waitSend(int* rank, Milliseconds limit) override {
      return mesh_->unless_aborted([&] { return inner_->waitSend(rank, limit); });
    }
    void abortWaitRecv() override { inner_->abortWaitRecv(); }
    void abortWaitSend() override { inner_->abortWaitSend(); }
    void send(int to, uint64_t slot, size_t offset, size_t bytes) override {
      mesh_->unless_aborted([&] { return inner_->send(to, slot, offset, bytes), true; });
    }
    void recv(int from, uint64_t slot, size_t offset, size_t bytes) override {
      mesh_->unless_aborted([&] { return inner_->recv(from, slot, offset, bytes), true; });
    }
    void recv(std::vector<int> from, uint64_t slot, size_t offset, size_t bytes) override {
      mesh_->unless_aborted([&] { return inner_->recv(from, slot, offset, bytes), true; });
    }

   private:
    const std::shared_ptr<Mesh> mesh_;
    const std::unique_ptr<UnboundBuffer> inner_;
  };

  // A wait returns false only when it was woken by abort(). What a step throws because the
  // connections are closed is less telling than why they are.
  template <typename Step>
  bool unless_aborted(Step&& step) {
    try {
      if (!aborted_ && step()) return true;
    } catch (...) {
      if (!aborted_) throw;
    }
    std::lock_guard<std::mutex> guard(lock_);
    throw gloo::IoException(reason_);
  }

  const std::shared_ptr<Context> inner_;
  std::mutex lock_;
  std::atomic<bool> aborted_{false};
  std::string reason_;
  std::set<UnboundBuffer*> buffers_;
};

struct MeshDevice final : public gloo::transport::Device {
  explicit MeshDevice(const gloo::transport::tcp::attr& attr)
      : inner(gloo::transport::tcp::CreateDevice(attr)) {}
  std::string str() const override { return inner->str(); }
  const std::string& getPCIBusID() const override { return inner->getPCIBusID(); }
  std::shared_ptr<gloo::transport::Context> createContext(int rank, int size) override {
    return mesh = std::make_shared<Mesh>(inner->createContext(rank, size), rank, size);
  }
  const std::shared_ptr<gloo::transport::Device> inner;
  std::shared_ptr<Mesh> mesh;
};

}  // namespace pollen
