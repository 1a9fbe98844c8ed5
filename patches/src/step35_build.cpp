// Says which build a library is: the runtime compares it with the binding's version before it uses anything else.

#include "llama.h"

extern "C" LLAMA_API const char * step35_build(void);

// "VERSION COMMIT NAME": llama-cpp-python's version, llama.cpp's commit, the build's name
const char * step35_build(void) {
    return STEP35_BUILD;
}
