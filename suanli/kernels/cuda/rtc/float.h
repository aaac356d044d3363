#pragma once
#include <suanli_rtc.h>
