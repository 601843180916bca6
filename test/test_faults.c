#include "test.h"
void test_faults(void) { test_begin("faults"); test_skip("todo"); }
