"""Which task an input looks like, by a rule of thumb on its shape and its words."""

import re

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
    r"|discuss|provide|construct|compose|develop|propose|analy[sz]e|who|what|when|where|which|why|how)\b"
    r"|^(hãy|xin|vui lòng|viết|dịch|nói|kể|giải thích|liệt kê|tóm tắt|đổi|thêm|bớt|mô tả|tạo|tìm|đặt|so sánh|phân loại"
    r"|sửa|trả lời|tính|cho tôi|cho biết|chuyển|nêu|làm|phân tích|đưa ra|đề xuất|gợi ý|soạn|thiết kế)\b"
    r"|^(请|把|将|写|翻译|改|列|解释|描述|总结|给|告诉|生成|创建|设计|分析|比较|说明|提供|为|如何|什么|为什么|怎)"
    r"|[?？]\s*$|^[^:：\n]{1,80}[?？:：]\s*\S",
    re.IGNORECASE,
)


def infer_task(text: str, images: int, has_audio: bool) -> str | None:
    """The task that an input looks like, for `task="auto"`.

    Sound is `audio`. Text with images is `vqa_multi` if at least two of its lines begin with a speaker (`User: …`),
    `ocr` if it asks to read (words for reading and writing in Vietnamese, English or Chinese), else `vqa_single`. Text
    alone is `instr` if it is a question, begins with a request or has one before a colon, else `text_pair`. Images
    alone are no task of the six: the general embedding.
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
