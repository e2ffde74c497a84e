"""Place 2: bounded sums of per-record gradients. The reference path is `per_record`; faster paths will stand beside it."""
