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
template <typename T, int N, int kTransposed>
__device__ void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate);

// Accumulator registers as asm operands: their names, and their constraints.
#define SLOWFAST_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SLOWFAST_NAMES_32 SLOWFAST_NAMES_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SLOWFAST_NAMES_64 SLOWFAST_NAMES_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SLOWFAST_OUTPUTS_16(d) \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define SLOWFAST_OUTPUTS_32(d) SLOWFAST_OUTPUTS_16(d), \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define SLOWFAST_OUTPUTS_64(d) SLOWFAST_OUTPUTS_32(d), \
  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
// N columns need N / 2 registers a thread; the operands behind them are numbered from there.
#define SLOWFAST_WGMMA_SS(T, TYPE, N, TRANSPOSED_A, TRANSPOSED_B, REGISTERS, A, B, ACCUMULATE) \
  template <> \
  __device__ __forceinline__ void wgmma_ss<T, N, TRANSPOSED_A, TRANSPOSED_B>(float (&d)[REGISTERS], uint64_t a, uint64_t b, \
                                                                             int accumulate) { \
    asm volatile( \
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #ACCUMULATE ", 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" SLOWFAST_NAMES_##REGISTERS "}, " \
        "%" #A ", %" #B ", keep, 1, 1, " #TRANSPOSED_A ", " #TRANSPOSED_B ";\n}\n" \
        : SLOWFAST_OUTPUTS_##REGISTERS(d) \
        : "l"(a), "l"(b), "r"(accumulate)); \
  }
#define SLOWFAST_WGMMA_RS(T, TYPE, N, TRANSPOSED, REGISTERS, A0, A1, A2, A3, B, ACCUMULATE) \
  template <> \
  __device__ __forceinline__ void wgmma_rs<T, N, TRANSPOSED>(float (&d)[REGISTERS], const uint32_t (&a)[4], uint64_t b, \
                                                             int accumulate) { \
    asm volatile( \
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #ACCUMULATE ", 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" SLOWFAST_NAMES_##REGISTERS "}, " \
        "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", keep, 1, 1, " #TRANSPOSED ";\n}\n" \
        : SLOWFAST_OUTPUTS_##REGISTERS(d) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate)); \
  }
#define SLOWFAST_WGMMA(T, TYPE) \
  SLOWFAST_WGMMA_SS(T, TYPE, 32, 0, 0, 16, 16, 17, 18) \
  SLOWFAST_WGMMA_SS(T, TYPE, 64, 0, 0, 32, 32, 33, 34) \
  SLOWFAST_WGMMA_SS(T, TYPE, 32, 1, 1, 16, 16, 17, 18) \
  SLOWFAST_WGMMA_SS(T, TYPE, 64, 1, 1, 32, 32, 33, 34) \
  SLOWFAST_WGMMA_RS(T, TYPE, 128, 0, 64, 64, 65, 66, 67, 68, 69) \
  SLOWFAST_WGMMA_RS(T, TYPE, 64, 1, 32, 32, 33, 34, 35, 36, 37) \
  SLOWFAST_WGMMA_RS(T, TYPE, 128, 1, 64, 64, 65, 66, 67, 68, 69)

SLOWFAST_WGMMA(__nv_bfloat16, "bf16")
SLOWFAST_WGMMA(__half, "f16")

#undef SLOWFAST_WGMMA
#undef SLOWFAST_WGMMA_SS
#undef SLOWFAST_WGMMA_RS

}  // namespace slowfast::ptx
