// Calls all of the file reader's interface from several threads at once, for ThreadSanitizer
// (scripts/sanitize.sh): file_reader_race FILE, which is written. The exit status is 1 if a
// read is not reported once, or with bytes of another place of the file.
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "file_reader.h"

namespace {

using vmo::FileReader;
using vmo::Priority;

constexpr uint64_t kBlockBytes = vmo::kDirectAlignment;
constexpr uint64_t kFileBlocks = 2048;
constexpr uint64_t kMostBlocks = 256;  // of one read: several chunks
constexpr int64_t kReadsPerThread = 150;
constexpr int64_t kMostPending = 60;  // so that all is called while others still submit
constexpr int32_t kNumThreads = 4;

// Every block of the file holds its number, again and again.
void write_file(const std::string& path) {
  std::ofstream file(path, std::ios::binary);
  for (uint64_t block = 0; block < kFileBlocks; ++block) {
    const std::vector<uint64_t> content(kBlockBytes / sizeof(uint64_t), block);
    file.write(reinterpret_cast<const char*>(content.data()), kBlockBytes);
  }
}

// One read and what became of it.
struct Target {
  uint64_t first_block = 0;
  std::vector<uint64_t> content;
  bool was_dropped = false;       // before it began
  std::atomic<int32_t> times{0};  // it was reported
};

class Race {
 public:
  explicit Race(const std::string& path) : reader_({path}, false, kNumThreads, {}) {
    std::minstd_rand random(1);
    for (Target& target : targets_) {
      const uint64_t num_blocks = 1 + random() % kMostBlocks;
      target.first_block = random() % (kFileBlocks - num_blocks);
      target.content.assign(num_blocks * kBlockBytes / sizeof(uint64_t), ~uint64_t{0});
    }
  }

  // Whether every read was reported once, with the right bytes, or dropped.
  bool run() {
    std::vector<std::thread> threads;
    for (const int64_t first : {int64_t{0}, kReadsPerThread}) {
      threads.emplace_back([this, first] { ask(first); });
    }
    for (size_t i = 0; i < 2; ++i) threads.emplace_back([this, i] { wait(1 + 3 * i); });
    for (std::thread& thread : threads) thread.join();
    while (wait_once(1, std::chrono::milliseconds(-1)) != 0) {
    }
    for (const Target& target : targets_) {
      if (target.times != (target.was_dropped ? 0 : 1)) is_right_ = false;
    }
    return is_right_;
  }

 private:
  vmo::ReadRequest request_of(int64_t tag, Priority priority) {
    Target& target = targets_[static_cast<size_t>(tag)];
    const size_t bytes = target.content.size() * sizeof(uint64_t);
    const size_t first = bytes / kBlockBytes / 2 * kBlockBytes;
    auto* data = reinterpret_cast<char*>(target.content.data());
    vmo::ReadRequest request{tag, target.first_block * kBlockBytes, priority, {}};
    if (first != 0) request.extents.push_back({data, first});
    request.extents.push_back({data + first, bytes - first});
    return request;
  }

  // Reads of both priorities, of which, and of those of the other thread, some are moved or
  // dropped while they wait, are read or are over.
  void ask(int64_t first_tag) {
    std::minstd_rand random(static_cast<uint32_t>(first_tag) + 1);
    for (int64_t tag = first_tag; tag < first_tag + kReadsPerThread; tag += 3) {
      while (num_submitted_ - num_over_ > kMostPending) {
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      }
      std::vector<vmo::ReadRequest> requests;
      for (int64_t i = tag; i < tag + 3; ++i) {
        requests.push_back(request_of(i, i % 3 == 0 ? Priority::kDemand : Priority::kPrefetch));
      }
      reader_.submit(std::move(requests));
      num_submitted_ += 3;
      reader_.promote(tag + 1);
      reader_.promote(static_cast<int64_t>(random() % kNumReads));
      drop(tag + static_cast<int64_t>(random() % 3));
      drop(static_cast<int64_t>(random() % kNumReads));
    }
  }

  void drop(int64_t tag) {
    if (!reader_.drop(tag)) return;
    targets_[static_cast<size_t>(tag)].was_dropped = true;
    ++num_over_;
  }

  void wait(size_t min_count) {
    while (num_submitted_ < kNumReads) {
      if (reader_.num_ended() > 0) wait_once(min_count, std::chrono::milliseconds(0));
      wait_once(min_count, std::chrono::milliseconds(1));
    }
  }

  size_t wait_once(size_t min_count, std::chrono::milliseconds timeout) {
    std::vector<vmo::ReadResult> results(16);
    const size_t count = reader_.wait(results.data(), results.size(), min_count, timeout);
    for (size_t i = 0; i < count; ++i) look_at(results[i]);
    return count;
  }

  void look_at(const vmo::ReadResult& result) {
    Target& target = targets_[static_cast<size_t>(result.tag)];
    ++target.times;
    ++num_over_;
    if (result.error == ECANCELED) return;
    bool is_right = result.error == 0;
    for (size_t i = 0; i < target.content.size(); ++i) {
      const uint64_t block = target.first_block + i * sizeof(uint64_t) / kBlockBytes;
      is_right &= target.content[i] == block;
    }
    if (!is_right) is_right_ = false;
  }

  static constexpr int64_t kNumReads = 2 * kReadsPerThread;
  std::vector<Target> targets_ = std::vector<Target>(kNumReads);
  std::atomic<int64_t> num_submitted_{0};
  std::atomic<int64_t> num_over_{0};  // reported or dropped
  std::atomic<bool> is_right_{true};
  FileReader reader_;  // closed before what it reads to goes
};

// Closes a reader while its threads read, and others have just asked for more.
void close_while_reading(const std::string& path) {
  std::vector<std::vector<char>> targets(64, std::vector<char>(kMostBlocks * kBlockBytes));
  FileReader reader({path}, false, kNumThreads, {});
  std::vector<std::thread> threads;
  for (const size_t first : {0, 32}) {
    threads.emplace_back([&, first] {
      for (size_t i = first; i < first + 32; ++i) {
        const Priority priority = i % 2 == 0 ? Priority::kDemand : Priority::kPrefetch;
        reader.submit(
            {{static_cast<int64_t>(i), 0, priority, {{targets[i].data(), targets[i].size()}}}});
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FILE\n", argv[0]);
    return 2;
  }
  const std::string path = argv[1];
  write_file(path);
  const bool is_right = Race(path).run();
  for (int32_t i = 0; i < 10; ++i) close_while_reading(path);
  if (!is_right) std::fprintf(stderr, "a read was lost, reported twice or wrong\n");
  return is_right ? 0 : 1;
}
