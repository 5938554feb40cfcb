/* A loop that is compiled for each level of instructions; the one for the CPU at hand is taken. */
#ifndef QZO_CPUS_H
#define QZO_CPUS_H

#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EACH_CPU __attribute__((noinline, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

#endif
