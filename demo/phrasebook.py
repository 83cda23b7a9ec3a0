"""Questions, answers and instructions about the demo world's scenes, in three languages.

Fields in braces are those of `scenes.words`, and the few that a table's comment names.
"""

from .scenes import VOCABULARY

LANGUAGE_NAMES = {
    "vi": {"vi": "tiếng Việt", "en": "tiếng Anh", "zh": "tiếng Trung"},
    "en": {"vi": "Vietnamese", "en": "English", "zh": "Chinese"},
    "zh": {"vi": "越南语", "en": "英语", "zh": "中文"},
}

# language -> kind -> wordings; {text} is the sentence worked on, {goal} a place to go to, the rest is `words`.
INSTRUCTIONS = {
    "vi": {
        "translate": ("Dịch sang {target}: {text}", "Câu này nói thế nào bằng {target}? {text}"),
        "rephrase": ("Nói lại theo cách khác: {text}", "Diễn đạt lại câu sau: {text}"),
        "colour": ("Đổi sang màu {colour}: {text}", "Tô lại thành màu {colour}: {text}"),
        "bigger": ("Làm cho lớn hơn: {text}", "Phóng to lên: {text}"),
        "smaller": ("Làm cho nhỏ hơn: {text}", "Thu nhỏ lại: {text}"),
        "more": ("Thêm một {noun} nữa: {text}", "Cho thêm một {noun}: {text}"),
        "fewer": ("Bớt đi một {noun}: {text}", "Lấy đi một {noun}: {text}"),
        "place": ("Chuyển {goal}: {text}", "Đưa {goal}: {text}"),
    },
    "en": {
        "translate": ("Translate into {target}: {text}", "Say this in {target}: {text}"),
        "rephrase": ("Say it another way: {text}", "Rephrase this: {text}"),
        "colour": ("Change the colour to {colour}: {text}", "Paint {it} {colour}: {text}"),
        "bigger": ("Make {it} bigger: {text}", "Enlarge {it}: {text}"),
        "smaller": ("Make {it} smaller: {text}", "Shrink {it}: {text}"),
        "more": ("Add one more: {text}", "Add {another}: {text}"),
        "fewer": ("Take one away: {text}", "Remove {one}: {text}"),
        "place": ("Move {it} {goal}: {text}", "Put {it} {place}: {text}"),
    },
    "zh": {
        "translate": ("翻译成{target}：{text}", "用{target}怎么说：{text}"),
        "rephrase": ("换一种说法：{text}", "改写这句话：{text}"),
        "colour": ("把颜色改成{colour}：{text}", "涂成{colour}：{text}"),
        "bigger": ("变大一点：{text}", "放大：{text}"),
        "smaller": ("变小一点：{text}", "缩小：{text}"),
        "more": ("再加一{measure}：{text}", "多放一{measure}：{text}"),
        "fewer": ("去掉一{measure}：{text}", "拿走一{measure}：{text}"),
        "place": ("移到{goal}：{text}", "放到{goal}：{text}"),
    },
}
GOALS = {
    "vi": {"grass": "ra bãi cỏ", "sea": "xuống biển", "sky": "lên trời", "sand": "ra bãi cát"},
    "en": {"grass": "to the grass", "sea": "to the sea", "sky": "to the sky", "sand": "to the sand"},
    "zh": VOCABULARY["zh"]["place"],
}

READING = {  # language -> what the words stand on -> wordings
    "vi": {
        "sign": ("Trên biển ghi gì?", "Đọc tấm biển này.", "Tấm biển viết gì vậy?"),
        "ticket": ("Trên vé ghi gì?", "Đọc tấm vé này.", "Tấm vé viết gì vậy?"),
    },
    "en": {
        "sign": ("What does the sign say?", "Read this sign.", "What is written on the sign?"),
        "ticket": ("What does the ticket say?", "Read this ticket.", "What is written on the ticket?"),
    },
    "zh": {
        "sign": ("牌子上写着什么？", "读一下这块牌子。"),
        "ticket": ("票上写着什么？", "读一下这张票。"),
    },
}

# language -> asked attribute ("what" asks for all) -> (wordings, full answer, short answer)
QUESTIONS: dict[str, dict[str, tuple[tuple[str, ...], str, str]]] = {
    "vi": {
        "what": (
            ("Bạn thấy gì trong hình?", "Trong hình có gì?", "Hãy mô tả bức hình."),
            "Tôi thấy {count} {noun} {colour} {size} {place}.",
            "{Noun}.",
        ),
        "count": (
            ("Trong hình có mấy vật?", "Có bao nhiêu vật trong hình?"),
            "Trong hình có {count} {noun} {colour} {size} {place}.",
            "{Count}.",
        ),
        "colour": (
            ("Vật trong hình màu gì?", "Đây là màu gì?"),
            "Màu {colour}, đó là {count} {noun} {size} màu {colour} {place}.",
            "Màu {colour}.",
        ),
        "size": (
            ("Vật trong hình lớn hay nhỏ?", "Vật trong hình to cỡ nào?"),
            "Cỡ {size}, đó là {count} {noun} {colour} cỡ {size} {place}.",
            "Cỡ {size}.",
        ),
        "place": (
            ("Cảnh này ở đâu?", "Vật trong hình ở đâu?"),
            "Ở {place}, tại đó có {count} {noun} {colour} {size}.",
            "Ở {place}.",
        ),
    },
    "en": {
        "what": (
            ("What do you see?", "What is in the picture?", "Describe the picture."),
            "I see {count} {size} {colour} {noun} {place}.",
            "{Naming}.",
        ),
        "count": (
            ("How many are there?", "How many things do you see?"),
            "The picture shows {count} {size} {colour} {noun} {place}.",
            "{Count}.",
        ),
        "colour": (
            ("Which colour do you see?", "What colour is shown?"),
            "{It_is} {colour}: {count} {size} {colour} {noun} {place}.",
            "{Colour}.",
        ),
        "size": (
            ("Big or small?", "What size is shown in the picture?"),
            "{It_is} {size}: {count} {size} {colour} {noun} {place}.",
            "{Size}.",
        ),
        "place": (
            ("Where is this?", "What is the place in the picture?"),
            "{Place}, where there {be} {count} {size} {colour} {noun}.",
            "{Place}.",
        ),
    },
    "zh": {
        "what": (
            ("图里有什么？", "你看到了什么？"),
            "我看到{place}有{count}{measure}{colour}的{size}{noun}。",
            "{noun}。",
        ),
        "count": (
            ("图里有几个？", "一共有多少？"),
            "一共{count}{measure}，{place}有{count}{measure}{colour}的{size}{noun}。",
            "{count}{measure}。",
        ),
        "colour": (
            ("图里的东西是什么颜色？", "这是什么颜色的？"),
            "是{colour}的，{place}有{count}{measure}{colour}的{size}{noun}。",
            "{colour}的。",
        ),
        "size": (
            ("图里的东西是大还是小？", "图里的东西有多大？"),
            "是{size}的，{place}有{count}{measure}{colour}的{size}{noun}。",
            "{size}的。",
        ),
        "place": (
            ("这是在哪里？", "图里的东西在哪里？"),
            "在{place}，那里有{count}{measure}{colour}的{size}{noun}。",
            "在{place}。",
        ),
    },
}
SPEAKERS = {"vi": ("Người dùng: ", "Trợ lý: "), "en": ("User: ", "Assistant: "), "zh": ("用户：", "助手：")}
TWO_PICTURES = {
    "vi": "Hình 1: <image> Hình 2: <image>",
    "en": "Picture 1: <image> Picture 2: <image>",
    "zh": "图1：<image> 图2：<image>",
}
ABOUT = {  # how a question begins that is about the first or the second of two pictures
    "vi": ("Về hình thứ nhất: ", "Về hình thứ hai: "),
    "en": ("About the first picture: ", "About the second picture: "),
    "zh": ("关于第一张图：", "关于第二张图："),
}
