#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda_check.h"
#include "gather.h"

namespace vmo {

namespace {

constexpr int32_t kBlocks = 32;
constexpr int32_t kThreads = 256;
constexpr int32_t kLoadsInFlight = 8;  // per thread
constexpr int32_t kMaxPairs = 256;     // per launch

// Work is cut into chunks, so that all blocks read one record together.
constexpr uint64_t kChunkBytes = 16ULL * kThreads * kLoadsInFlight;

struct Tensor {
  TensorSlots where;
  uint64_t num_chunks = 0;  // of one slot
  int32_t unit_bytes = 1;   // that source, target and length are multiples of
};

// A kernel's arguments: at most 4 KiB.
struct GatherArguments {
  const char* records = nullptr;
  uint64_t record_bytes = 0;
  uint64_t chunks_per_pair = 0;
  int32_t num_tensors = 0;
  int32_t num_pairs = 0;
  Tensor tensors[kMaxGatherTensors];
  SlotPair pairs[kMaxPairs];
};
static_assert(sizeof(GatherArguments) <= 4096, "arguments of a kernel");

// All threads of a block copy `bytes`, a multiple of the unit. Loads are issued together, as
// each takes a round trip over the link. They are marked as streaming: nobody reads the host's
// memory twice.
template <typename Unit>
__device__ void copy_chunk(const char* source, char* target, uint64_t bytes) {
  const uint64_t count = bytes / sizeof(Unit);
  const Unit* from = reinterpret_cast<const Unit*>(source);
  Unit* to = reinterpret_cast<Unit*>(target);
  for (uint64_t begin = threadIdx.x; begin < count;
       begin += static_cast<uint64_t>(kThreads) * kLoadsInFlight) {
    Unit values[kLoadsInFlight];
#pragma unroll
    for (int32_t i = 0; i < kLoadsInFlight; ++i) {
      const uint64_t index = begin + static_cast<uint64_t>(i) * kThreads;
      if (index < count) values[i] = __ldcs(from + index);
    }
#pragma unroll
    for (int32_t i = 0; i < kLoadsInFlight; ++i) {
      const uint64_t index = begin + static_cast<uint64_t>(i) * kThreads;
      if (index < count) to[index] = values[i];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ GatherArguments arguments) {
  const uint64_t num_chunks = arguments.chunks_per_pair * arguments.num_pairs;
  for (uint64_t index = blockIdx.x; index < num_chunks; index += gridDim.x) {
    const SlotPair pair = arguments.pairs[index / arguments.chunks_per_pair];
    uint64_t chunk = index % arguments.chunks_per_pair;
    int32_t t = 0;
    while (chunk >= arguments.tensors[t].num_chunks) chunk -= arguments.tensors[t++].num_chunks;
    const Tensor& tensor = arguments.tensors[t];
    const uint64_t slot_bytes = tensor.where.slot_bytes;
    const uint64_t begin = chunk * kChunkBytes;
    const uint64_t bytes = slot_bytes - begin < kChunkBytes ? slot_bytes - begin : kChunkBytes;
    const char* source = arguments.records + pair.host_slot * arguments.record_bytes +
                         tensor.where.record_offset + begin;
    char* target = tensor.where.slots + pair.device_slot * slot_bytes + begin;
    if (tensor.unit_bytes == 16) {
      copy_chunk<uint4>(source, target, bytes);
    } else if (tensor.unit_bytes == 4) {
      copy_chunk<uint32_t>(source, target, bytes);
    } else {
      copy_chunk<uint8_t>(source, target, bytes);
    }
  }
}

int32_t unit_bytes_of(uint64_t addresses_and_lengths) {
  if (addresses_and_lengths % 16 == 0) return 16;
  return addresses_and_lengths % 4 == 0 ? 4 : 1;
}

}  // namespace

void gather_records(const char* records, uint64_t record_bytes,
                    const std::vector<TensorSlots>& tensors, const SlotPair* pairs,
                    int32_t num_pairs, cudaStream_t stream) {
  if (tensors.size() > static_cast<size_t>(kMaxGatherTensors)) {
    throw std::invalid_argument("the gather kernel takes records of at most " +
                                std::to_string(kMaxGatherTensors) + " tensors, got " +
                                std::to_string(tensors.size()));
  }
  GatherArguments arguments;
  arguments.records = records;
  arguments.record_bytes = record_bytes;
  for (const TensorSlots& where : tensors) {
    if (where.slot_bytes == 0) continue;
    Tensor& tensor = arguments.tensors[arguments.num_tensors++];
    tensor.where = where;
    tensor.num_chunks = (where.slot_bytes + kChunkBytes - 1) / kChunkBytes;
    tensor.unit_bytes = unit_bytes_of(reinterpret_cast<uintptr_t>(records) | record_bytes |
                                      where.record_offset | where.slot_bytes |
                                      reinterpret_cast<uintptr_t>(where.slots));
    arguments.chunks_per_pair += tensor.num_chunks;
  }
  if (arguments.num_tensors == 0) return;
  for (int32_t begin = 0; begin < num_pairs; begin += kMaxPairs) {
    arguments.num_pairs = std::min(num_pairs - begin, kMaxPairs);
    std::copy_n(pairs + begin, arguments.num_pairs, arguments.pairs);
    const uint64_t num_chunks =
        arguments.chunks_per_pair * static_cast<uint64_t>(arguments.num_pairs);
    const auto blocks = static_cast<unsigned>(std::min<uint64_t>(num_chunks, kBlocks));
    void* parameters[] = {&arguments};
    check_cuda(
        cudaLaunchKernel(&gather_kernel, dim3(blocks), dim3(kThreads), parameters, 0, stream),
        "cudaLaunchKernel (gather)");
  }
}

}  // namespace vmo
