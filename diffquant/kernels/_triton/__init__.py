"""Device code in Triton, one product or quantizer per file; the light kernels beside this folder say
what each needs.

What a product computes in is the dtype of its input, passed as a constant. Triton's interpreter is
right for float16 and float32, which is what tests run on a CPU; bfloat16 only runs on a device.
"""
