// Included before everything else of every file, by the compiler's -include (CMakeLists.txt: PMRL_PORTABLE).
//
// Functions that glibc has in two versions, the newer one by a mere relabelling, are asked for in the older: else the
// library would not load on a glibc older than the one that it was linked with. exp, exp2 and log of GLIBC_2.29 are those
// of 2.2.5 less a wrapper that sets errno. Those of libdl and libpthread have been in libc since 2.34; where they were
// before is why CMakeLists.txt links these two.
__asm__(".symver exp,exp@GLIBC_2.2.5");
__asm__(".symver exp2,exp2@GLIBC_2.2.5");
__asm__(".symver log,log@GLIBC_2.2.5");
__asm__(".symver dlopen,dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym,dlsym@GLIBC_2.2.5");
__asm__(".symver dlerror,dlerror@GLIBC_2.2.5");
__asm__(".symver pthread_once,pthread_once@GLIBC_2.2.5");
