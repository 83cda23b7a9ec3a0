"""Makes the demo world's fonts and recordings again: `python demo/assets/make_assets.py`.

Needs what nothing else here needs: espeak-ng, fontTools, and the Noto and DejaVu fonts under /usr/share/fonts (Debian:
`apt install espeak-ng fonts-noto-core fonts-noto-cjk fonts-dejavu-extra && pip install fonttools`). The demo and the
tests never run this; they read the files it left.
"""

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from fontTools import subset  # pyright: ignore[reportMissingImports]
from scipy.signal import resample_poly

from vipolyqwen.demo.scenes import VOCABULARY, all_scenes, describe, spoken_phrases

HERE = Path(__file__).parent
RATE = 16_000
VIETNAMESE = "àáảãạăằắẳẵặâầấẩẫậèéẻẽẹêềếểễệìíỉĩịòóỏõọôồốổỗộơờớởỡợùúủũụưừứửữựỳýỷỹỵđ"
FONTS = {  # shipped name -> (installed file, number inside a collection, for Chinese)
    "NotoSans-Regular.ttf": ("truetype/noto/NotoSans-Regular.ttf", 0, False),
    "NotoSerif-Bold.ttf": ("truetype/noto/NotoSerif-Bold.ttf", 0, False),
    "NotoSans-Bold.ttf": ("truetype/noto/NotoSans-Bold.ttf", 0, False),
    "DejaVuSansCondensed-Bold.ttf": ("truetype/dejavu/DejaVuSansCondensed-Bold.ttf", 0, False),
    "NotoSansCJKsc-Regular.otf": ("opentype/noto/NotoSansCJK-Regular.ttc", 2, True),
    "NotoSerifCJKsc-Bold.otf": ("opentype/noto/NotoSerifCJK-Bold.ttc", 2, True),
}
# voice -> words a minute. espeak-ng 1.51 reads `cmn` as English letters; `cmn-latn-pinyin` is right (its issue 1370).
VOICES = {
    "vi": {"vi": 215, "vi-vn-x-south+f4": 260},
    "en": {"en-us": 205, "en-gb+f4": 200},
    "zh": {"cmn-latn-pinyin": 235, "cmn-latn-pinyin+f4": 285},
}
PINYIN = dict(  # tones as they sound in these phrases: yi1 is yi2 before a fourth tone and yi4 before the others
    entry.split("=")
    for entry in (
        "草=cao3 地=di4 上=shang4 海里=hai2-li3 天=tian1 沙=sha1 滩=tan1 有=you3 "
        "一个=yi2-ge4 一=yi4 两=liang3 三=san1 四=si4 颗=ke1 条=tiao2 艘=sou1 个=ge4 朵=duo3 把=ba3 "
        "红=hong2 黄=huang2 蓝=lan2 紫=zi3 白=bai2 黑=hei1 色=se4 的=de5 大=da4 小=xiao3 "
        "星星=xing1-xing5 鱼=yu2 船=chuan2 球=qiu2 花=hua1 伞=san3"
    ).split()
)


def pinyin(phrase: str) -> str:
    """The phrase in numbered pinyin; the longest entry of `PINYIN` wins."""
    syllables = []
    while phrase:
        head = next(phrase[:n] for n in (2, 1) if phrase[:n] in PINYIN)
        syllables += PINYIN[head].split("-")
        phrase = phrase[len(head) :]
    return " ".join(syllables)


def make_font(name: str, source: str, number: int, chinese: bool) -> None:
    """Cuts a font down to ASCII and the letters of Vietnamese, or to ASCII and the demo's Chinese characters."""
    used = "".join(describe(scene, "zh", t) for scene in all_scenes() for t in range(3)) + "，。：？"
    text = used if chinese else VIETNAMESE + VIETNAMESE.upper()
    options = subset.Options(font_number=number, hinting=False, desubroutinize=True, name_IDs=[0, 1, 2, 13, 14])
    options.layout_features = ["kern"]
    font = subset.load_font(Path("/usr/share/fonts") / source, options)
    cutter = subset.Subsetter(options)
    cutter.populate(text=text + "".join(map(chr, range(32, 127))))
    cutter.subset(font)
    subset.save_font(font, HERE / "fonts" / name, options)


def record(phrase: str, language: str, voice: str, pace: int) -> np.ndarray:
    """One phrase as said by espeak-ng: (samples,) float, 16 kHz mono, peak 0.7, silence trimmed, ends faded."""
    said = pinyin(phrase) if language == "zh" else phrase
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run(["espeak-ng", "-v", voice, "-s", str(pace), "-w", file.name, said], check=True)
        clip, rate = soundfile.read(file.name)
    clip = resample_poly(clip, RATE, rate)
    loud = np.abs(clip) > 0.02 * np.abs(clip).max()
    first, last = np.flatnonzero(loud)[[0, -1]]
    clip = clip[max(0, first - 80) : last + 160]
    ramp = np.linspace(0, 1, 80)
    clip[:80] *= ramp
    clip[-80:] *= ramp[::-1]
    return 0.7 * clip / np.abs(clip).max()


def make_clips() -> None:
    """Records every phrase in every voice into one file, `clips.ogg`, with `clips.json` saying what is where."""
    clips, places, position = [], [], 0
    for language in VOCABULARY:
        phrases = sorted({phrase for scene in all_scenes() for phrase in spoken_phrases(scene, language)})
        for voice, pace in VOICES[language].items():
            for phrase in phrases:
                clip = record(phrase, language, voice, pace)
                clips.append(clip)
                places.append([language, voice, phrase, position, position + len(clip)])
                position += len(clip)
    quality = {"format": "OGG", "subtype": "VORBIS", "compression_level": 0.3}
    with soundfile.SoundFile(HERE / "clips.ogg", "w", RATE, 1, **quality) as file:
        for clip in clips:  # libsndfile 1.2.2 crashes on one long Vorbis write
            file.write(clip)
    lines = ",\n".join(json.dumps(place, ensure_ascii=False) for place in places)
    (HERE / "clips.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main() -> None:
    """Fonts, then recordings."""
    for name, (source, number, chinese) in FONTS.items():
        make_font(name, source, number, chinese)
    make_clips()


if __name__ == "__main__":
    main()
