// What headers of newer compilers and C libraries ask for, and those of manylinux_2_28 (glibc 2.28, GCC 8) do not have.
// Defined here, it is the library's own: csrc/exports.map exports nothing.
#include <new>
#include <sstream>

// libstdc++'s headers read it to count references without atomics. 0: there may be other threads. (glibc 2.32)
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;

#ifdef __GLIBCXX__
// Inline in the headers, and declared to be in libstdc++.so, as GLIBCXX_3.4.26.
template std::basic_stringbuf<char>::basic_stringbuf();
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();

// What a std::vector throws whose size no memory could hold. (GLIBCXX_3.4.29)
namespace std {
void __throw_bad_array_new_length() __attribute__((__noreturn__));  // as libstdc++ from GCC 11 on declares it
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
#endif
