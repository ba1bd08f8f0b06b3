// NCCL and the CUDA driver as far as Pollen calls them, on host memory and inside one process, for
// tests without a GPU. Ranks of one id are threads; an operation is done for all when the last rank
// has launched it. Compiled with -D to be old, to lack a function, or to fail in a certain way:
//   FAKE_VERSION      what ncclGetVersion says (default 2.27.3)
//   FAKE_LACKS_ABORT  has no ncclCommAbort
//   FAKE_NEVER_READY  connecting never ends
//   FAKE_APART        each rank is a process: connecting needs no other, operations wait for ever
//   FAKE_STUCK        operations never end
//   FAKE_ASYNC        the asynchronous error of a launched operation
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#ifndef FAKE_VERSION
#define FAKE_VERSION 22703
#endif

namespace {

struct Id {
  char bytes[128];
};

struct Config {
  size_t size;
  unsigned magic, version;
  int blocking;
};

// One operation of all ranks.
struct Round {
  std::vector<const void*> in;
  std::vector<void*> out;
  int launched = 0;
  bool done = false;
};

struct Group {
  int world;
  int joined = 0;
  std::map<long, Round> rounds;
};

struct Comm {
  Group* group;
  int rank;
  long next = 0;
};

std::mutex lock;
std::map<std::string, Group> groups;
int made = 0, aborted = 0, destroyed = 0;
thread_local Comm* current = nullptr;  // A rank's calls come from one thread after its start.

size_t width(int dtype) {
  switch (dtype) {
    case 1: return 1;
    case 9: return 2;
    case 7: return 4;
    default: return 8;
  }
}

float widen(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <typename T>
T combine(T a, T b, int op) {
  if (op == 0) return a + b;
  if (op == 2) return a > b ? a : b;
  return a < b ? a : b;
}

template <typename T>
void reduce(std::vector<char>& sum, const void* from, size_t count, int op) {
  T* to = reinterpret_cast<T*>(sum.data());
  const T* values = static_cast<const T*>(from);
  for (size_t i = 0; i < count; i++) to[i] = combine(to[i], values[i], op);
}

void reduce_bf16(std::vector<char>& sum, const void* from, size_t count, int op) {
  uint16_t* to = reinterpret_cast<uint16_t*>(sum.data());
  const uint16_t* values = static_cast<const uint16_t*>(from);
  for (size_t i = 0; i < count; i++) to[i] = narrow(combine(widen(to[i]), widen(values[i]), op));
}

void add(std::vector<char>& sum, const void* from, size_t count, int dtype, int op) {
  switch (dtype) {
    case 1: return reduce<uint8_t>(sum, from, count, op);
    case 4: return reduce<int64_t>(sum, from, count, op);
    case 7: return reduce<float>(sum, from, count, op);
    case 8: return reduce<double>(sum, from, count, op);
    default: return reduce_bf16(sum, from, count, op);
  }
}

// Adds a rank to the operation; `finish` runs when all are there. Returns a status.
template <typename Finish>
int launch(Comm* comm, const void* in, void* out, Finish finish) {
  std::lock_guard<std::mutex> guard(lock);
  Group& group = *comm->group;
  Round& round = group.rounds[comm->next++];
  round.in.resize(group.world);
  round.out.resize(group.world);
  round.in[comm->rank] = in;
  round.out[comm->rank] = out;
  if (++round.launched == group.world) {
    finish(group, round);
    round.done = true;
  }
  return 7;
}

}  // namespace

extern "C" {

int ncclGetVersion(int* version) {
  *version = FAKE_VERSION;
  return 0;
}

int ncclGetUniqueId(Id* id) {
  std::lock_guard<std::mutex> guard(lock);
  std::memset(id->bytes, 0, sizeof id->bytes);
  std::string text = "fake " + std::to_string(++made);
  std::memcpy(id->bytes, text.data(), text.size());
  return 0;
}

int ncclCommInitRankConfig(Comm** comm, int world, Id id, int rank, Config* config) {
  // 4: invalid argument. What NCCL checks of the configuration.
  if (config->magic != 0xcafebeef || config->blocking != 0 || rank >= world) return 4;
  std::lock_guard<std::mutex> guard(lock);
  Group& group = groups[std::string(id.bytes, sizeof id.bytes)];
  group.world = world;
  group.joined++;
  *comm = new Comm{&group, rank};
  return 7;
}

int ncclCommGetAsyncError(Comm* comm, int* state) {
  std::lock_guard<std::mutex> guard(lock);
  current = comm;
#ifdef FAKE_NEVER_READY
  *state = 7;
  return 0;
#endif
#ifdef FAKE_ASYNC
  if (comm->next > 0) {
    *state = FAKE_ASYNC;
    return 0;
  }
#endif
#ifdef FAKE_APART
  *state = 0;
#else
  *state = comm->group->joined < comm->group->world ? 7 : 0;
#endif
  return 0;
}

#ifndef FAKE_LACKS_ABORT
int ncclCommAbort(Comm*) {
  std::lock_guard<std::mutex> guard(lock);
  aborted++;
  return 0;
}
#endif

int ncclCommFinalize(Comm*) { return 0; }

int ncclCommDestroy(Comm*) {
  std::lock_guard<std::mutex> guard(lock);
  destroyed++;
  return 0;
}

const char* ncclGetErrorString(int status) {
  return status == 6 ? "remote process exited" : "invalid argument";
}

const char* ncclGetLastError(Comm*) { return "a fake has no more to say"; }

int ncclAllReduce(const void* in, void* out, size_t count, int dtype, int op, Comm* comm, void*) {
  return launch(comm, in, out, [=](Group& group, Round& round) {
    size_t bytes = count * width(dtype);
    const char* first = static_cast<const char*>(round.in[0]);
    std::vector<char> sum(first, first + bytes);
    for (int rank = 1; rank < group.world; rank++) add(sum, round.in[rank], count, dtype, op);
    for (void* to : round.out) std::memcpy(to, sum.data(), bytes);
  });
}

int ncclReduceScatter(const void* in, void* out, size_t part, int dtype, int op, Comm* comm, void*) {
  return launch(comm, in, out, [=](Group& group, Round& round) {
    size_t bytes = part * width(dtype);
    const char* first = static_cast<const char*>(round.in[0]);
    std::vector<char> sum(first, first + bytes * group.world);
    for (int rank = 1; rank < group.world; rank++) {
      add(sum, round.in[rank], part * group.world, dtype, op);
    }
    for (int rank = 0; rank < group.world; rank++) {
      std::memcpy(round.out[rank], sum.data() + bytes * rank, bytes);
    }
  });
}

int ncclAllGather(const void* in, void* out, size_t part, int dtype, Comm* comm, void*) {
  return launch(comm, in, out, [=](Group& group, Round& round) {
    size_t bytes = part * width(dtype);
    std::vector<char> all;
    for (const void* from : round.in) {
      const char* start = static_cast<const char*>(from);
      all.insert(all.end(), start, start + bytes);
    }
    for (void* to : round.out) std::memcpy(to, all.data(), bytes * group.world);
  });
}

int ncclBroadcast(const void* in, void* out, size_t count, int dtype, int root, Comm* comm, void*) {
  return launch(comm, in, out, [=](Group&, Round& round) {
    size_t bytes = count * width(dtype);
    const char* start = static_cast<const char*>(round.in[root]);
    std::vector<char> copy(start, start + bytes);
    for (void* to : round.out) std::memcpy(to, copy.data(), bytes);
  });
}

int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? 0 : 101;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &lock;
  return 0;
}
int cuCtxSetCurrent(void* context) { return context == &lock ? 0 : 201; }
int cuStreamCreate(void** stream, unsigned) {
  *stream = new int;
  return 0;
}
int cuStreamDestroy_v2(void* stream) {
  delete static_cast<int*>(stream);
  return 0;
}
int cuStreamQuery(void*) {
  std::lock_guard<std::mutex> guard(lock);
#ifdef FAKE_STUCK
  if (current->next > 0) return 600;
#endif
  for (long number = 0; number < current->next; number++) {
    if (!current->group->rounds[number].done) return 600;
  }
  return 0;
}

int cuMemAlloc_v2(uint64_t* pointer, size_t bytes) {
  *pointer = reinterpret_cast<uint64_t>(std::malloc(bytes));
  return 0;
}
int cuMemFree_v2(uint64_t pointer) {
  std::free(reinterpret_cast<void*>(pointer));
  return 0;
}
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return 0;
}
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
  std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return 0;
}

int fake_aborted() {
  std::lock_guard<std::mutex> guard(lock);
  return aborted;
}
int fake_destroyed() {
  std::lock_guard<std::mutex> guard(lock);
  return destroyed;
}
}
