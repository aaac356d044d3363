// An assertion that fails ends the kernel, and is a finding with its line.
#undef assert
#ifdef NDEBUG
#define assert(condition) ((void)0)
#else
#define assert(condition)                                                                         \
    ((condition) ? (void)0 : suanli_trapped("assert(" #condition ") does not hold", suanli_site()))
#endif
