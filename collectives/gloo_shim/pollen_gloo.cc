// Plain C functions over Gloo, for pollen-collectives to open at run time.
//
// No C++ exception leaves this file: a function that fails returns non-zero (or a null pointer)
// and pollen_gloo_last_error() on the same thread says why. One thread at a time may run
// collectives on a context; pollen_gloo_abort() may be called from any other.

#include <gloo/allgather.h>
#include <gloo/allreduce.h>
#include <gloo/barrier.h>
#include <gloo/broadcast.h>
#include <gloo/rendezvous/context.h>
#include <gloo/rendezvous/store.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "mesh.h"

namespace {

using pollen::Mesh;
using pollen::MeshDevice;
using pollen::Milliseconds;

thread_local std::string last_error;

template <typename Body>
int guarded(Body&& body) noexcept {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "unknown C++ exception";
  }
  return 1;
}

struct Session {
  std::shared_ptr<Mesh> mesh;
  std::shared_ptr<gloo::rendezvous::Context> context;
};

template <typename T> T add(T a, T b) { return static_cast<T>(a + b); }
// A NaN wins, so that a non-finite value on any rank is seen by all.
template <typename T> T larger(T a, T b) { return a != a ? a : (b > a || b != b ? b : a); }
template <typename T> T smaller(T a, T b) { return a != a ? a : (b < a || b != b ? b : a); }

template <typename T, T (*combine)(T, T)>
void combine_all(void* out, const void* left, const void* right, size_t count) {
  auto* c = static_cast<T*>(out);
  const auto* a = static_cast<const T*>(left);
  const auto* b = static_cast<const T*>(right);
  for (size_t i = 0; i < count; i++) c[i] = combine(a[i], b[i]);
}

// `Wrapping` is the unsigned type of integers, whose sums wrap instead of being undefined.
template <typename T, typename Wrapping = T>
void reduce(const Session& session, void* data, size_t count, int op, uint32_t tag,
            Milliseconds limit) {
  gloo::AllreduceOptions options(session.context);
  options.setOutput(static_cast<T*>(data), count);
  options.setAlgorithm(gloo::AllreduceOptions::Algorithm::RING);
  options.setReduceFunction(op == 0   ? combine_all<Wrapping, add<Wrapping>>
                            : op == 1 ? combine_all<T, larger<T>>
                                      : combine_all<T, smaller<T>>);
  options.setTag(tag);
  options.setTimeout(limit);
  gloo::allreduce(options);
}

}  // namespace

extern "C" {

using Sink = void (*)(void* sink, const uint8_t* data, size_t length);

// The rendezvous store, as callbacks that return 0 on success.
struct PollenGlooStore {
  void* user;
  int (*set)(void* user, const char* key, const uint8_t* data, size_t length);
  int (*get)(void* user, const char* key, void* sink, Sink write);
  int (*wait)(void* user, const char* key);
};

}  // extern "C"

namespace {

class CallbackStore final : public gloo::rendezvous::Store {
 public:
  explicit CallbackStore(const PollenGlooStore& callbacks) : calls_(callbacks) {}
  void set(const std::string& key, const std::vector<char>& data) override {
    check(calls_.set(calls_.user, key.c_str(), reinterpret_cast<const uint8_t*>(data.data()),
                     data.size()), "set", key);
  }
  std::vector<char> get(const std::string& key) override {
    std::vector<char> value;
    const Sink write = [](void* sink, const uint8_t* data, size_t length) {
      static_cast<std::vector<char>*>(sink)->assign(data, data + length);
    };
    check(calls_.get(calls_.user, key.c_str(), &value, write), "get", key);
    return value;
  }
  void wait(const std::vector<std::string>& keys) override {
    for (const auto& key : keys) check(calls_.wait(calls_.user, key.c_str()), "wait for", key);
  }

 private:
  static void check(int failed, const char* action, const std::string& key) {
    if (failed) throw gloo::IoException(std::string("store: cannot ") + action + " " + key);
  }
  const PollenGlooStore calls_;
};

}  // namespace

#define POLLEN_GLOO_API extern "C" __attribute__((visibility("default")))

POLLEN_GLOO_API uint32_t pollen_gloo_version() { return 1; }

POLLEN_GLOO_API const char* pollen_gloo_last_error() { return last_error.c_str(); }

// `interface` is used if it is not empty, else `hostname`, which may be an address.
POLLEN_GLOO_API void* pollen_gloo_connect(int rank, int size, const char* hostname,
                                          const char* interface, int64_t timeout_ms,
                                          const PollenGlooStore* store) {
  Session* session = nullptr;
  guarded([&] {
    gloo::transport::tcp::attr attr;
    attr.hostname = hostname;
    attr.iface = interface;
    auto device = std::make_shared<MeshDevice>(attr);
    std::shared_ptr<gloo::transport::Device> transport = device;
    auto context = std::make_shared<gloo::rendezvous::Context>(rank, size);
    // Gloo waits five times its timeout for a connection.
    context->setTimeout(Milliseconds(timeout_ms / 5 + 1));
    CallbackStore callbacks(*store);
    context->connectFullMesh(callbacks, transport);
    session = new Session{std::move(device->mesh), std::move(context)};
  });
  return session;
}

// dtype: 0 f32, 1 f64, 2 i64, 3 u8; op: 0 sum, 1 max, 2 min. In place.
POLLEN_GLOO_API int pollen_gloo_all_reduce(void* handle, void* data, size_t count, int dtype,
                                           int op, uint32_t tag, int64_t timeout_ms) {
  return guarded([&] {
    auto& session = *static_cast<Session*>(handle);
    const Milliseconds limit(timeout_ms);
    switch (dtype) {
      case 0: return reduce<float>(session, data, count, op, tag, limit);
      case 1: return reduce<double>(session, data, count, op, tag, limit);
      case 2: return reduce<int64_t, uint64_t>(session, data, count, op, tag, limit);
      case 3: return reduce<uint8_t>(session, data, count, op, tag, limit);
      default: throw gloo::InvalidOperationException("unknown element type");
    }
  });
}

POLLEN_GLOO_API int pollen_gloo_broadcast(void* handle, void* data, size_t bytes, int root,
                                          uint32_t tag, int64_t timeout_ms) {
  return guarded([&] {
    gloo::BroadcastOptions options(static_cast<Session*>(handle)->context);
    options.setOutput(static_cast<uint8_t*>(data), bytes);
    options.setRoot(root);
    options.setTag(tag);
    options.setTimeout(Milliseconds(timeout_ms));
    gloo::broadcast(options);
  });
}

// `output` holds `bytes` times the world size, with this rank's part already in its place.
POLLEN_GLOO_API int pollen_gloo_all_gather(void* handle, void* output, size_t bytes, uint32_t tag,
                                           int64_t timeout_ms) {
  return guarded([&] {
    const auto& context = static_cast<Session*>(handle)->context;
    gloo::AllgatherOptions options(context);
    options.setOutput(static_cast<uint8_t*>(output), bytes * static_cast<size_t>(context->size));
    options.setTag(tag);
    options.setTimeout(Milliseconds(timeout_ms));
    gloo::allgather(options);
  });
}

POLLEN_GLOO_API int pollen_gloo_barrier(void* handle, uint32_t tag, int64_t timeout_ms) {
  return guarded([&] {
    gloo::BarrierOptions options(static_cast<Session*>(handle)->context);
    options.setTag(tag);
    options.setTimeout(Milliseconds(timeout_ms));
    gloo::barrier(options);
  });
}

// Closes all connections and wakes a running collective, which then fails with `reason`.
POLLEN_GLOO_API void pollen_gloo_abort(void* handle, const char* reason) {
  guarded([&] { static_cast<Session*>(handle)->mesh->abort(reason); });
}

POLLEN_GLOO_API void pollen_gloo_destroy(void* handle) {
  guarded([&] { delete static_cast<Session*>(handle); });
}
