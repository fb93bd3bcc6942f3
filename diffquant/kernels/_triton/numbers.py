"""Codes and scales as numbers, elementwise on tiles. Every one is exact.

float16 holds what e2m1 and e4m3 bits become by shifting, subnormals included, and it holds each
product of the two: 2 and 4 significant bits between 2^-10 and 2688.
"""

import triton
import triton.language as tl


@triton.jit
def e2m1(code):
    """4-bit codes s ee m as float16: s 000ee m, which is 2^-14 of what is meant."""
    wide = code.to(tl.uint16)
    bits = ((wide & 8) << 12) | ((wide & 7) << 9)
    return bits.to(tl.float16, bitcast=True) * 16384.0


@triton.jit
def e4m3(code):
    """Bytes s eeee mmm as float16: s 0eeee mmm, which is 2^-8 of what is meant; 0x7f is NaN."""
    wide = code.to(tl.uint16)
    size = wide & 0x7F
    bits = ((wide & 0x80) << 8) | tl.where(size == 0x7F, 0x7E00, size << 7)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def e8m0(code):
    """Bytes b as float32 2^(b - 127): b is where float32 keeps its exponent; 255 is NaN."""
    wide = code.to(tl.uint32)
    bits = tl.where(wide == 0, 0x00400000, wide << 23)
    bits = tl.where(wide == 255, 0x7FC00000, bits)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def signed4(code):
    """4-bit two's complement as float32, -8 to 7."""
    return ((code ^ 8).to(tl.int32) - 8).to(tl.float32)


@triton.jit
def unsigned4(code):
    """0 to 15 as float32."""
    return code.to(tl.float32)


@triton.jit
def offset4(code):
    """The code less 8 as float32."""
    return (code.to(tl.int32) - 8).to(tl.float32)


@triton.jit
def signed8(code):
    """Bytes of two's complement as float32, -128 to 127."""
    return ((code ^ 128).to(tl.int32) - 128).to(tl.float32)


@triton.jit
def number(value):
    """Numbers that are stored as such, as float32."""
    return value.to(tl.float32)


@triton.jit
def rounded(value):
    """float32 to the nearest integer, ties to even, for sizes below 2^22: adding 1.5 * 2^23 leaves
    the sum no bits for a fraction."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def as_e4m3(value):
    """float32 up to 448 rounded to what e4m3 holds, ties to even, so that a cast has nothing left to
    round: the interpreter's drops carries. Adding 1.5 * 2^20 of the power of two in a number leaves
    three bits behind it, and of 2^-6 those of subnormals."""
    bits = value.to(tl.uint32, bitcast=True) & 0x7F800000
    power = tl.maximum(bits.to(tl.uint32).to(tl.float32, bitcast=True), 0.015625)
    return (value + power * 1572864.0) - power * 1572864.0


@triton.jit
def as_bfloat16(value):
    """float32 rounded to what bfloat16 holds, by its bits: the interpreter casts to it wrongly."""
    bits = value.to(tl.uint32, bitcast=True)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
