// wgmma.mma_async m64nNk16 with float32 accumulators: d[64 x N] (+)= a[64 x 16] b[16 x N].
//   wgmma_ss: a and b in shared memory. wgmma_rs: a in registers, b in shared memory.
// An operand in shared memory is K-major, or MN-major if transposed: of tiles of tokens x D, b is K-major for Q K^T and
// MN-major for P V.
// One specialisation a shape, because the accumulator registers are operands; only shapes that are used are here.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

#include "../common/memory.cuh"

namespace slowfast::ptx {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of an accumulator across an asynchronous product.
template <int N>
__device__ __forceinline__ void wgmma_fence_operand(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Shared-memory matrix descriptor, 128-byte swizzle. Byte offsets between 8-row groups (stride) and, for an MN-major
// operand, between its 64-element column blocks (leading).
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* tile, uint32_t leading_bytes, uint32_t stride_bytes) {
  const uint64_t address = cuda::shared_address(tile);
  return ((address & 0x3FFFF) >> 4) | (static_cast<uint64_t>(leading_bytes >> 4) << 16) |
         (static_cast<uint64_t>(stride_bytes >> 4) << 32) | (1ull << 62);
}

template <typename T, int N, int kTransposedA = 0, int kTransposedB = 0>
__device__ void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate);
// d = a b.
template <typename T, int N, int kTransposedA = 0, int kTransposedB = 0>
__device__ void wgmma_ss_first(float (&d)[N / 2], uint64_t a, uint64_t b);
template <typename T, int N, int kTransposed>
__device__ void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate);

// Accumulator registers as asm operands: their names, and their constraints.
#define SLOWFAST_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SLOWFAST_NAMES_32 SLOWFAST_NAMES_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SLOWFAST_NAMES_64 SLOWFAST_NAMES_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// F: "+f", or "=f" if what was in them does not count.
#define SLOWFAST_OUTPUTS_16(F, d) \
  F(d[0]), F(d[1]), F(d[2]), F(d[3]), F(d[4]), F(d[5]), F(d[6]), F(d[7]), \
  F(d[8]), F(d[9]), F(d[10]), F(d[11]), F(d[12]), F(d[13]), F(d[14]), F(d[15])
#define SLOWFAST_OUTPUTS_32(F, d) SLOWFAST_OUTPUTS_16(F, d), \
  F(d[16]), F(d[17]), F(d[18]), F(d[19]), F(d[20]), F(d[21]), F(d[22]), F(d[23]), \
  F(d[24]), F(d[25]), F(d[26]), F(d[27]), F(d[28]), F(d[29]), F(d[30]), F(d[31])
#define SLOWFAST_OUTPUTS_64(F, d) SLOWFAST_OUTPUTS_32(F, d), \
  F(d[32]), F(d[33]), F(d[34]), F(d[35]), F(d[36]), F(d[37]), F(d[38]), F(d[39]), \
  F(d[40]), F(d[41]), F(d[42]), F(d[43]), F(d[44]), F(d[45]), F(d[46]), F(d[47]), \
  F(d[48]), F(d[49]), F(d[50]), F(d[51]), F(d[52]), F(d[53]), F(d[54]), F(d[55]), \
  F(d[56]), F(d[57]), F(d[58]), F(d[59]), F(d[60]), F(d[61]), F(d[62]), F(d[63])
// N columns need N / 2 registers a thread; the operands behind them are numbered from there.
#define SLOWFAST_WGMMA_SS(T, TYPE, N, TRANSPOSED_A, TRANSPOSED_B, REGISTERS, A, B, ACCUMULATE) \
  template <> \
  __device__ __forceinline__ void wgmma_ss<T, N, TRANSPOSED_A, TRANSPOSED_B>(float (&d)[REGISTERS], uint64_t a, uint64_t b, \
                                                                             int accumulate) { \
    asm volatile( \
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #ACCUMULATE ", 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" SLOWFAST_NAMES_##REGISTERS "}, " \
        "%" #A ", %" #B ", keep, 1, 1, " #TRANSPOSED_A ", " #TRANSPOSED_B ";\n}\n" \
        : SLOWFAST_OUTPUTS_##REGISTERS("+f", d) \
        : "l"(a), "l"(b), "r"(accumulate)); \
  }
#define SLOWFAST_WGMMA_SS_FIRST(T, TYPE, N, TRANSPOSED_A, TRANSPOSED_B, REGISTERS, A, B) \
  template <> \
  __device__ __forceinline__ void wgmma_ss_first<T, N, TRANSPOSED_A, TRANSPOSED_B>(float (&d)[REGISTERS], uint64_t a, uint64_t b) { \
    asm volatile( \
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, 0, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" SLOWFAST_NAMES_##REGISTERS "}, " \
        "%" #A ", %" #B ", keep, 1, 1, " #TRANSPOSED_A ", " #TRANSPOSED_B ";\n}\n" \
        : SLOWFAST_OUTPUTS_##REGISTERS("=f", d) \
        : "l"(a), "l"(b)); \
  }
#define SLOWFAST_WGMMA_RS(T, TYPE, N, TRANSPOSED, REGISTERS, A0, A1, A2, A3, B, ACCUMULATE) \
  template <> \
  __device__ __forceinline__ void wgmma_rs<T, N, TRANSPOSED>(float (&d)[REGISTERS], const uint32_t (&a)[4], uint64_t b, \
                                                             int accumulate) { \
    asm volatile( \
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #ACCUMULATE ", 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" SLOWFAST_NAMES_##REGISTERS "}, " \
        "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", keep, 1, 1, " #TRANSPOSED ";\n}\n" \
        : SLOWFAST_OUTPUTS_##REGISTERS("+f", d) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate)); \
  }
#define SLOWFAST_WGMMA(T, TYPE) \
  SLOWFAST_WGMMA_SS(T, TYPE, 32, 0, 0, 16, 16, 17, 18) \
  SLOWFAST_WGMMA_SS(T, TYPE, 64, 0, 0, 32, 32, 33, 34) \
  SLOWFAST_WGMMA_SS(T, TYPE, 32, 1, 1, 16, 16, 17, 18) \
  SLOWFAST_WGMMA_SS(T, TYPE, 64, 1, 1, 32, 32, 33, 34) \
  SLOWFAST_WGMMA_SS_FIRST(T, TYPE, 64, 0, 0, 32, 32, 33) \
  SLOWFAST_WGMMA_SS_FIRST(T, TYPE, 32, 1, 1, 16, 16, 17) \
  SLOWFAST_WGMMA_SS_FIRST(T, TYPE, 64, 1, 1, 32, 32, 33) \
  SLOWFAST_WGMMA_RS(T, TYPE, 128, 0, 64, 64, 65, 66, 67, 68, 69) \
  SLOWFAST_WGMMA_RS(T, TYPE, 64, 1, 32, 32, 33, 34, 35, 36, 37) \
  SLOWFAST_WGMMA_RS(T, TYPE, 128, 1, 64, 64, 65, 66, 67, 68, 69)

SLOWFAST_WGMMA(__nv_bfloat16, "bf16")
SLOWFAST_WGMMA(__half, "f16")

#undef SLOWFAST_WGMMA
#undef SLOWFAST_WGMMA_SS
#undef SLOWFAST_WGMMA_SS_FIRST
#undef SLOWFAST_WGMMA_RS

}  // namespace slowfast::ptx
