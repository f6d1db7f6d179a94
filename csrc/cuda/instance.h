// Names of what a file compiled for one element and width defines.
#pragma once

#if !defined(RMT_ELEMENT) || !defined(RMT_WIDTH)
#error "compile with -DRMT_ELEMENT=BF16 or F16 and -DRMT_WIDTH=64 or 128"
#endif
#define RMT_JOIN_(a, b, c) a##_##b##_##c
#define RMT_JOIN(a, b, c) RMT_JOIN_(a, b, c)
#define RMT_INSTANCE(name) RMT_JOIN(name, RMT_ELEMENT, RMT_WIDTH)
