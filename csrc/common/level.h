// One source, compiled once per instruction set into its own namespace; the bindings choose at run
// time.
//   portable     any CPU                    4 floats
//   avx2         x86-64-v3: AVX2, FMA, F16C 8 floats
//   avx512       x86-64-v4                  16 floats
//   avx512bf16   avx512 and AVX512_BF16     bf16 products by vdpbf16ps (cpu_pairs.cpp), avx512 for the rest
//   amx          avx512 and AMX_BF16        bf16 products on tiles (cpu_tiles.cpp), avx512 for the rest
#pragma once

#ifndef LK_LEVEL
#error "compile with -DLK_LEVEL=portable|avx2|avx512|avx512bf16|amx"
#endif

#if defined(__AVX512F__)
#define LK_VL 16
#elif defined(__AVX2__)
#define LK_VL 8
#else
#define LK_VL 4
#endif

#define LK_INLINE inline __attribute__((always_inline))
#define LK_UNROLL _Pragma("GCC unroll 16")
