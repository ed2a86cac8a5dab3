// Compiles a loop twice where one wheel serves every x86-64; which to run is decided once, when the extension is loaded.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define TORCHSURGEON_VECTOR __attribute__((target_clones("avx2", "default")))
#else
#define TORCHSURGEON_VECTOR
#endif
