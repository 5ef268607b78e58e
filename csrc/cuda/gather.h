// Copies records from mapped host memory into slots of several tensors, by a kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

namespace vmo {

// One tensor of a record: `slot_bytes` from `record_offset` on, to slot r at `slots` + r *
// slot_bytes.
struct TensorSlots {
  uint64_t record_offset = 0;
  uint64_t slot_bytes = 0;
  char* slots = nullptr;
};

struct SlotPair {
  int32_t host_slot = 0;
  int32_t device_slot = 0;
};

// Most tensors of a record that the kernel takes.
inline constexpr int32_t kMaxGatherTensors = 16;

// Queues the copies of all pairs on `stream`; `records` is host memory as the device sees it.
// A fixed, small grid: the link is the limit, and kernels beside it need the processors.
// Throws CudaError, and std::invalid_argument on more than kMaxGatherTensors tensors.
void gather_records(const char* records, uint64_t record_bytes,
                    const std::vector<TensorSlots>& tensors, const SlotPair* pairs,
                    int32_t num_pairs, cudaStream_t stream);

}  // namespace vmo
