#include "kda/reference.h"
