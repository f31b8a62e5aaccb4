"""What tests of kernels share between lanes: cases, inputs, the error rule, the sanitiser."""
