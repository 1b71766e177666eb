"""One model out of many moments."""
