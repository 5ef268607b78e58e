// Copies records from host memory into slots of a pool on a device, beside the compute stream.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "cuda_check.h"
#include "gather.h"

namespace vmo {

enum class CopyEngine : int32_t {
  kMemcpy = 0,  // cudaMemcpyAsync, one per tensor: the device's copy engines
  kGather = 1,  // one kernel per call: for records of many small tensors
};

struct CopierConfig {
  int32_t device = 0;
  char* records = nullptr;  // host memory [num_host_slots, record_bytes], the caller's
  uint64_t record_bytes = 0;
  int32_t num_host_slots = 0;
  int32_t num_device_slots = 0;
  std::vector<TensorSlots> tensors;
};

// Lane 0 is for demands, lane 1 for prefetches; each is a stream. Not thread safe. Every
// function throws CudaError if the device reports an error, and std::invalid_argument on a
// slot, lane or ticket that does not exist.
class Copier {
 public:
  // Page-locks the records' memory.
  explicit Copier(const CopierConfig& config);
  // Waits for all copies; errors of the device are ignored here.
  ~Copier();
  Copier(const Copier&) = delete;
  Copier& operator=(const Copier&) = delete;

  void set_engine(CopyEngine engine);

  // Queues the copies; returns a ticket for all of them, valid until release(). On an error
  // nothing of the call is under way any more.
  int32_t copy(int32_t lane, const SlotPair* pairs, int32_t num_pairs);
  bool done(int32_t ticket);
  void wait(int32_t ticket);
  // What is queued on `compute` from now on waits for the ticket's copies.
  void join(int32_t ticket, cudaStream_t compute);
  void release(int32_t ticket);
  // Copies queued from now on wait for what was queued on `compute` so far.
  void after_compute(cudaStream_t compute);

 private:
  void check(const SlotPair& pair) const;
  Event& event_of(int32_t ticket);
  void queue(const SlotPair* pairs, int32_t num_pairs, cudaStream_t stream);
  int32_t take_ticket();

  const CopierConfig config_;
  std::unique_ptr<HostRegistration> registration_;
  std::array<std::unique_ptr<Stream>, 2> lanes_;
  std::unique_ptr<Event> compute_;
  CopyEngine engine_ = CopyEngine::kMemcpy;
  std::vector<std::unique_ptr<Event>> events_;  // by ticket
  std::vector<bool> in_use_;
  std::vector<int32_t> free_tickets_;
};

}  // namespace vmo
