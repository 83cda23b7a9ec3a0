"""Prefixes of the tasks; the rule of thumb of `task="auto"`, which infers a task from modalities and words."""

import re

TASK_PREFIXES = {
    "text_pair": "<text_pair>",
    "instr": "<instr>",
    "ocr": "<ocr>",
    "vqa_single": "<vqa_single>",
    "vqa_multi": "<vqa_multi>",
    "audio": "<audio>",
}
PREFIX_SIDES = ("a", "both", "none")  # the sides of a task's pairs that carry its prefix
AUTO_TASK = "auto"
TURN = re.compile(r"^[^\n:：]{1,20}[:：] ?\S", re.MULTILINE)  # `User: …` at the beginning of a line
READING = re.compile(
    r"\b(read|reads|say|says|written|writing|text|word|words|letter|letters|spell|spells|title|label|caption)\b"
    r"|\b(đọc|ghi|viết|chữ|dòng chữ|văn bản|tiêu đề|từ nào)\b|[读念写]|文字|标题|什么字",
    re.IGNORECASE,
)
REQUEST = re.compile(
    r"^(please|write|say|tell|translate|change|describe|explain|list|give|name|find|make|create|generate|add|remove"
    r"|summari[sz]e|rewrite|rephrase|paraphrase|classify|identify|compare|calculate|convert|suggest|answer|edit|design"
    r"|discuss|provide|construct|compose|develop|propose|analy[sz]e|determine|rank|choose|select|complete|fill|replace"
    r"|insert|assign|sort|arrange|brainstorm|outline|draft|imagine|pretend|assume|role-?play|you are|given|come up"
    r"|how (do|can|to|would|should))\b"
    r"|^(hãy|xin hãy|viết|dịch|nói lại|kể (tên|lại|về|một|cho)|giải thích|liệt kê|tóm tắt|đổi|thêm|bớt|mô tả|tạo|tìm"
    r"|đặt|so sánh|phân loại|phân tích|sửa|trả lời|tính toán|cho (tôi|biết|một|hai|ba)|chuyển|nêu|làm thế nào|đưa ra"
    r"|đề xuất|gợi ý|soạn|biên soạn|thiết kế|xác định|cung cấp|xây dựng|lập|phát triển|sắp xếp|chỉnh sửa|chọn|dự đoán"
    r"|thảo luận|ước tính|phác thảo|tên (một|hai|ba|bốn|năm|\d+))\b"
    r"|^(请|写|翻译|改写|列出|解释|描述|总结|给出|告诉|生成|创建|设计|分析|比较|说明|提供|如何|根据|用\S{1,4}(说|写)|换)"
    r"|\n|^[^,，.。!！\"“\n:：]{1,40}[?？:：]\s*[^\s\"“]",  # several lines; a request, then its subject
    re.IGNORECASE,
)


def infer_task(text: str, images: int, has_audio: bool) -> str | None:
    """Infers the task of an input, for `task="auto"`.

    Audio, with or without other parts, is `audio`. Text with images is `vqa_multi` if at least two of its lines begin
    with a speaker (`User: …`), `ocr` if it asks to read (words for reading and writing in Vietnamese, English or
    Chinese), else `vqa_single`. Text alone is `instr` if it begins with a request in one of the three languages, has
    several lines, or has a question or a heading before its subject (`Say this in Vietnamese: …`); otherwise it is
    `text_pair`, as is a question by itself. Images alone get no task, which is the general embedding.

    Args:
        text: the text parts, joined; empty without text.
        images: number of images.
        has_audio: whether the input has audio.

    Returns:
        The task's name, or `None` for the general embedding.
    """
    if has_audio:
        return "audio"
    if not text.strip():
        return None
    if images:
        if len(TURN.findall(text)) >= 2:
            return "vqa_multi"
        return "ocr" if READING.search(text) else "vqa_single"
    return "instr" if REQUEST.search(text.strip()) else "text_pair"


__all__ = ["AUTO_TASK", "PREFIX_SIDES", "TASK_PREFIXES", "infer_task"]
