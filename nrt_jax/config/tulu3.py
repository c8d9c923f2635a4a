"""The sources of allenai/tulu-3-sft-mixture: their licences, and the paper's counts of them."""

from typing import NamedTuple


class Tulu3Source(NamedTuple):
    """What is known of a source by its name in the column `source`."""

    licence: str | None
    """As the card of the data set states it (https://huggingface.co/datasets/allenai/
    tulu-3-sft-mixture, the list of sets); None where it states none."""
    rows: int
    """In the release of 939,343 rows."""
    table4: int
    """In the 204,800 rows that the paper trained on (Table 4)."""


ROWS, TABLE4 = 939_343, "tulu3_table4"
"""Rows of the release, and the name by which a config asks for the counts of Table 4."""

_APACHE, _ODC = "Apache-2.0", "ODC-BY-1.0"
# The paper shortens the name of the source of WildGuardMix.
SOURCES = {
    "ai2-adapt-dev/personahub_math_v5_regen_149960": Tulu3Source(_ODC, 149_960, 33_036),
    "ai2-adapt-dev/evol_codealpaca_heval_decontaminated": Tulu3Source(_APACHE, 107_276, 23_778),
    "ai2-adapt-dev/tulu_v3.9_aya_100k": Tulu3Source(_APACHE, 100_000, 22_088),
    "ai2-adapt-dev/flan_v2_converted": Tulu3Source(None, 89_982, 20_010),
    "ai2-adapt-dev/tulu_v3.9_wildchat_100k": Tulu3Source(_ODC, 100_000, 19_378),
    "ai2-adapt-dev/numinamath_tir_math_decontaminated": Tulu3Source(_APACHE, 64_312, 13_999),
    "allenai/tulu-3-sft-personas-math-grade": Tulu3Source(_ODC, 49_980, 11_115),
    "ai2-adapt-dev/tulu_v3.9_open_math_2_gsm8k_50k": Tulu3Source(None, 50_000, 11_081),
    "ai2-adapt-dev/tulu_v3.9_wildjailbreak_decontaminated_50k": Tulu3Source(_ODC, 50_000, 11_069),
    "ai2-adapt-dev/tulu_v3.9_synthetic_finalresp_wildguardmixtrain_decontaminated_50k": Tulu3Source(
        _APACHE, 50_000, 10_935
    ),
    "ai2-adapt-dev/personahub_code_v2_34999": Tulu3Source(_ODC, 34_999, 7_859),
    "ai2-adapt-dev/personahub_ifdata_manual_seed_v3_29980": Tulu3Source(_ODC, 29_980, 6_483),
    "ai2-adapt-dev/tulu_v3.9_personahub_math_interm_algebra_20k": Tulu3Source(_ODC, 20_000, 4_529),
    "ai2-adapt-dev/coconot_converted": Tulu3Source(_ODC, 10_983, 2_441),
    "ai2-adapt-dev/tulu_v3.9_sciriff_10k": Tulu3Source(_ODC, 10_000, 2_177),
    "ai2-adapt-dev/no_robots_converted": Tulu3Source("CC-BY-NC-4.0", 9_500, 2_114),
    "ai2-adapt-dev/oasst1_converted": Tulu3Source(_APACHE, 7_131, 1_606),
    "ai2-adapt-dev/tulu_v3.9_table_gpt_5k": Tulu3Source("MIT", 5_000, 1_062),
    "ai2-adapt-dev/tulu_hard_coded_repeated_10": Tulu3Source("CC-BY-4.0", 240, 40),
}
