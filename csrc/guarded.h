// How a C ABI reports failures: no exception leaves it, a message stays behind.
#pragma once

#include <exception>
#include <string>
#include <utility>

namespace vmo {

// What failed last in this thread; of the library that includes this (hidden visibility).
inline thread_local std::string last_error;

// Runs `body`, turning an exception into `failure` and a message.
template <typename Result, typename Body>
Result guarded(Result failure, Body&& body) noexcept {
  try {
    return std::forward<Body>(body)();
  } catch (const std::exception& error) {
    last_error = error.what();
    return failure;
  }
}

}  // namespace vmo
