"""Korean words beside numbers that say what these are: a telephone, an account, an order."""

from __future__ import annotations

import re

_BANKS = (
    "국민|신한|우리|하나|농협|기업|제일|씨티|외환|대구|부산|광주|전북|경남|제주|수협|신협|새마을(?:금고)?|우체국|산업|카카오|카뱅|토스|토뱅"
    "|케이뱅크|케뱅|축협|단위농협|스탠다드차타드"
)
_NUMBERS = (
    "주문|송장|운송장|등기|사업자|법인|상품|제품|관리|접수|승인|예약|쿠폰|회원|사건|문서|특허|출원|허가|신고|일련|고유|티켓|모델|품목|참조"
    "|처리|배송|택배|인증|등록|거래|결제|학생|수험|증명|보증|청구|계약|고객|시리얼|부품|자산|조회|발급|면허|여권|우편|공고|구매|확인|추적|도서"
    "|증서|과제|민원|교환권|상품권|당첨|복권|기기|단말기"
)
# The words that say what the number after them is. Where two could begin at one place the longer stands first.
LABEL = re.compile(
    rf"""
    (?P<rrn> 주민\s?(?:등록)?\s?(?:번호)? | 외국인\s?등록\s?(?:번호)? | 거소\s?신고\s?(?:번호)? | 실명\s?확인\s?번호
      | registration(?:\s?(?:no|number))? | \brrn\b )
  | (?P<other> (?:{_NUMBERS})\s?(?:등록|확인)?\s?(?:번호|코드|no\b|№|\#)
      | 운송장 | 송장 | 사업자 | 법인 | 코드 | 모델명? | 품번 | 학번 | 사번 | 버전 | 특허 | 바코드 | 시리얼 | 좌표
      | 타임스탬프 | 펌웨어 | 패치 | 빌드 | (?:등록|제품|시리얼|라이선스)\s?키
      | firmware | build | p/n | isbn | issn | barcode | serial | s/n | \bsn\b | model | version | \bver\b
      | sku | order | invoice | tracking | timestamp | \bid\b | \bno\b )
  | (?P<card> 카드 | 다이너스 | \bcard(?:[\s_]?(?:no|number))?\b | \bvisa\b | 비자 | 마스터 | master | amex | 아멕스 )
  | (?P<acc> 계좌 | 입금 | 송금 | 이체 | 예금주? | 통장 | 은행 | 뱅크 | 쏴 | \baccount(?:[\s_]?(?:no|number))?\b
      | \ba/c\b | 후원금 | 증권 | (?<![가-힣])(?:{_BANKS})(?=은행|뱅크|[\s:(/,-]*$)
      | (?<![a-z])(?:kb|nh|ibk|sc|dgb|bnk|keb)(?![a-z]) )
  | (?P<tel> 전화 | 연락 | 휴대 | 핸드폰 | 폰 | 콜센터 | 고객센터 | 대표\s?번호 | 상담 | 문의 | 문자 | 팩스 | 예약
      | [☎☏📞📱] | (?<![a-z])(?:tel|fax|phone|mobile|cell|call|contact|h\.?p|ars)(?![a-z])
      | (?<![a-z가-힣])[tmpcf](?=[.:)\s-]{{0,2}}$) )
    """,
    re.VERBOSE | re.IGNORECASE,
)
# What stands after a number that is called, or paid into; and after an amount, which is no number of anything.
CALLS = re.compile(r"[ )]*(?:으?로|에|번으로)? ?(?:전화|연락|문의|문자|상담|예약|콜)")
PAYS = re.compile(
    rf"[ )]*(?:으?로|에)? ?(?:입금|송금|이체|보내|부쳐)|[ (/,]+(?:{_BANKS})(?![가-힣])"
    rf"|[ (/,]*(?:예금주|계좌|(?:{_BANKS}|[가-힣]{{2}})(?:은행|뱅크))"
)
UNIT = re.compile(
    r"원|달러|엔|유로|위안|[만억천]|개|명|년|건|회|부|장|점|톤|km|kg|kb|mg|mb|gb|krw|usd|%|cm|mm", re.IGNORECASE
)
