// VMO_WIDE before a function: one binary for all x86-64 machines, wide vectors where there are
// any. (The resolvers of such clones run before AddressSanitizer is ready.)
#pragma once

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define VMO_WIDE __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define VMO_WIDE
#endif
