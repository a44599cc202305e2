"""The schemas of the SQL task, for training and for testing; no table is in both.

See `tables.py` for the notation.
"""

from collections.abc import Sequence

from train.tasks.sql.draw import Draw
from train.tasks.sql.tables import Schema, parse_schema

_TRAINING = {
    "library": """
        book(id, title=@title, author_id, genre=novel|poetry|drama, year=1950..2020,
            length=90..900+)
        author(id, name=@person, country=@country, birth_year=1900..1990)""",
    "hospital": """
        patient(id, name=@person, age=1..95, doctor_id, blood_group=A|B|AB|O, bill=50..900+)
        doctor(id, name=@person, specialty=surgery|cardiology|oncology, salary=60..180+)""",
    "airline": """
        airline(id, name=Aero|Trans|Sky|Global*Nord|Sur|Pacific|Orient, country=@country,
            fleet=9..250+)
        flight(id, code=@code, airline_id, destination=Paris|Rome|Oslo|Cairo, duration=45..600,
            capacity=60..380+)""",
    "school": """
        student(id, name=@person, teacher_id, grade=A|B|C|D, score=20..100,
            absence=0..60+)
        teacher(id, name=@person, subject=maths|history|biology,
            hiring_year=1980..2022)""",
    "restaurant": """
        dish(id, name=Roast|Spicy|Smoked|Grilled|Baked*Duck|Tofu|Salmon|Beans|Lamb|Corn,
            restaurant_id, course=starter|main|side, price=4..60, energy=90..900+)
        restaurant(id, name=@place, cuisine=Thai|Greek|Mexican, rating=1.0..5.0,
            capacity=5..60+)""",
    "football": """
        player(id, name=@person, club_id, position=goalkeeper|defender|striker, score=0..60+,
            age=17..40)
        club(id, name=@place, city=@city, founding_year=1870..1990, prestige=0..40+)""",
    "music": """
        artist(id, name=@person, country=@country, debut_year=1960..2020)
        song(id, title=@title, artist_id, style=rock|jazz|folk|pop, duration=120..480+,
            popularity=100..990+)""",
    "lending": """
        loan(id, borrower=@person, branch_id, purpose=car|home|study, amount=10..900+,
            term=6..240)
        branch(id, name=@place, city=@city, opening_year=1920..2015, staff=4..80+)""",
    "real_estate": """
        house(id, address=@place, agent_id, district=north|south|centre, price=90..900+,
            build_year=1890..2020)
        agent(id, name=@person, language=English|French|Turkish, turnover=1..90+)""",
    "cars": """
        car(id, model=@code, maker_id, fuel=petrol|diesel|electric, power=60..400, price=9..120+)
        maker(id, name=@firm, country=@country, founding_year=1890..2005)""",
    "hotel": """
        hotel(id, name=@place, city=@city, score=1.0..5.0, size=12..400+)
        guest(id, name=@person, hotel_id, nationality=German|Indian|Kenyan|Chilean,
            stay=1..30+, age=18..90)""",
    "museum": """
        painting(id, title=@title, museum_id, technique=oil|acrylic|ink, year=1600..1990,
            value=5..990+)
        museum(id, name=@place, city=@city, attendance=10..900+)""",
    "farm": """
        field(id, name=@place, farm_id, crop=wheat|maize|barley, area=2..90+, harvest=5..400+)
        farm(id, name=@ship, region=east|west|coast, founding_year=1850..2000)""",
    "zoo": """
        animal(id, name=@pet, keeper_id, species=lion|zebra|panda|otter, weight=3..400+,
            birth_year=1990..2023)
        keeper(id, name=@person, shift=morning|evening|night, salary=20..60+)""",
    "university": """
        course(id,
            title=Applied|Modern|Basic|Advanced*Logic|Ethics|Optics|Algebra|Genetics|Poetics|Law,
            department_id, level=bachelor|master|doctoral, workload=2..30, enrolment=5..300+)
        department(id,
            name=Physics|Botany|Music|Finance|Nursing|Theology|Design|Geology|Drama|Latin,
            campus=north|south|harbour, budget=100..990+)""",
    "company": """
        employee(id, name=@person, office_id, role=analyst|manager|clerk, salary=20..150+,
            hiring_year=1985..2023)
        office(id, name=@place, country=@country, height=1..40+)""",
    "shop": """
        product(id, name=Steel|Oak|Glass|Paper|Wool*Lamp|Chair|Shelf|Bowl|Clock|Mat,
            supplier_id, category=kitchen|office|garden, price=3..250, stock=0..500+)
        supplier(id, name=@firm, city=@city, rating=1.0..5.0)""",
    "cinema": """
        director(id, name=@person, country=@country, fame=0..30+)
        film(id, title=@title, director_id, genre=comedy|thriller|western, runtime=70..210,
            budget=1..250+)""",
    "shipping": """
        ship(id, name=@ship, port_id, type=tanker|ferry|trawler, tonnage=40..900+,
            build_year=1960..2020)
        port(id, name=@city, country=@country, capacity=3..90+)""",
    "energy": """
        plant(id, name=@place, operator_id, source=wind|solar|coal|gas, capacity=10..900+,
            opening_year=1955..2022)
        operator(id, name=@firm, country=@country, workforce=40..990+)""",
    "mountains": """
        peak(id, name=@ship, massif_id, country=@country, height=900..8800, traffic=5..800+)
        massif(id, name=@place, continent=Asia|Europe|Africa, area=0..90+)""",
    "lakes": """
        lake(id, name=@ship, province_id, kind=fresh|salt|brackish, depth=3..400, area=1..900+)
        province(id, name=@place, climate=mild|arid|polar, population=10..900+)""",
    "bug_tracker": """
        bug(id, title=Slow|Blank|Wrong|Lost|Frozen*Login|Menu|Page|Report|Button|Search, project_id,
            severity=minor|major|critical, support=0..300+, year=2005..2024)
        project(id, name=@firm, language=Python|Rust|Java, score=10..990+)""",
    "newspaper": """
        article(id, headline=@title, reporter_id, section=sports|politics|culture, length=150..990+,
            reach=40..900+)
        reporter(id, name=@person, city=@city, joining_year=1980..2023)""",
    "insurance": """
        insurer(id, name=@firm, country=@country, clientele=50..990+)
        policy(id, holder=@person, insurer_id, kind=life|travel|fire,
            premium=10..400+, year=1990..2024)""",
    "gym": """
        member(id, name=@person, gym_id, tariff=basic|premium|student, fee=10..90+,
            joining_year=2000..2024)
        gym(id, name=@place, city=@city, equipment=10..150+)""",
    "pharmacy": """
        drug(id, name=Beta|Neo|Ultra|Pro|Iso*Zol|Mycin|Statin|Pril|Cort, producer_id,
            form=tablet|syrup|cream, price=2..180, stock=5..600+)
        producer(id, name=@firm, country=@country, output=1..200+)""",
    "wine": """
        wine(id, name=@title, winery_id, grape=Merlot|Riesling|Syrah, vintage=1980..2022,
            price=5..300)
        winery(id, name=@place, region=valley|coast|plateau, area=2..150+)""",
    "railway": """
        station(id, name=@place, line_id, zone=inner|middle|outer, opening_year=1860..2015,
            traffic=10..900+)
        line(id, name=Amber|Coral|Ivory|Jade|Ruby|Indigo|Olive|Violet|Scarlet|Teal,
            operation=public|private|mixed, length=5..80+)""",
    "buses": """
        bus(id, plate=@code, garage_id, fuel=diesel|hydrogen|hybrid, capacity=18..90+,
            purchase_year=1998..2024)
        garage(id, name=@place, district=east|west|centre, staff=2..40+)""",
    "parks": """
        park(id, name=@place, district=north|south|harbour, seating=5..300+)
        tree(id, label=@code, park_id, species=oak|birch|cedar|elm, height=2.0..40.0,
            planting_year=1850..2015, girth=0..50+)""",
    "space": """
        mission(id, name=@ship, agency_id, target=Moon|Mars|Venus, cost=10..900+,
            launch_year=1965..2024)
        agency(id, name=@firm, country=@country, crew=0..60+)""",
    "election": """
        candidate(id, name=@person, party_id, district=rural|urban|coastal, age=21..85)
        party(id,
            name=Unity|Reform|Liberty|Progress|Justice|Green|Labour|Alliance|Civic|Forward,
            wing=left|centre|right, founding_year=1890..2015)""",
    "orchestra": """
        musician(id, name=@person, orchestra_id, instrument=violin|cello|flute|horn, salary=20..95+,
            joining_year=1985..2024)
        orchestra(id, name=@place, city=@city, activity=10..160+)""",
    "vet": """
        owner(id, name=@person, city=@city, loyalty=1..40+)
        pet(id, name=@pet, owner_id, species=dog|cat|parrot|rabbit, weight=0.5..45.0,
            age=1..20, dose=0..50+)""",
    "cycling": """
        rider(id, name=@person, team_id, nationality=Belgian|Dutch|Swiss|Danish,
            score=0..400+, age=18..42)
        team(id, name=@firm, country=@country, budget=2..90+)""",
    "bakery": """
        cake(id, name=Royal|Rustic|Tiny|Classic|Vegan*Tart|Roll|Torte|Pie|Loaf|Muffin, baker_id,
            flavour=lemon|cocoa|almond, price=3..90, demand=5..400+)
        baker(id, name=@person, city=@city, training_year=1975..2020)""",
    "bridges": """
        bridge(id, name=@place, engineer_id, material=steel|stone|timber, length=20..900+,
            build_year=1800..2020)
        engineer(id, name=@person, country=@country, experience=3..70+)""",
    "parcels": """
        parcel(id, code=@code, depot_id, status=lost|sent|delivered, weight=1..60+, cost=2..120+)
        depot(id, name=@place, city=@city, opening_year=1970..2022, workforce=5..200+)""",
    "law": """
        lawyer(id, name=@person, city=@city, admission_year=1970..2020)
        lawsuit(id, title=@title, lawyer_id, field=tax|labour|patent, payout=5..900+,
            filing_year=1990..2024)""",
    "theatre": """
        actor(id, name=@person, theatre_id, role=lead|support|extra, fee=5..300+,
            birth_year=1940..2004)
        theatre(id, name=@place, city=@city, capacity=80..990+)""",
    "auction": """
        lot(id, item=Old|Gilded|Carved|Painted|Rare*Vase|Coin|Watch|Mask|Map|Sword, seller_id,
            era=ancient|medieval|modern, demand=0..90+, price=10..900+)
        seller(id, name=@person, country=@country, joining_year=1995..2024)""",
}

_TEST = {
    "television": """
        serial(id, title=@title, network_id, genre=crime|sitcom|fantasy, length=1..40+,
            start_year=1960..2024)
        network(id, name=@firm, country=@country, audience=10..900+)""",
    "satellites": """
        rocket(id, name=@ship, country=@country, height=20..120)
        satellite(id, name=@code, rocket_id, orbit=low|polar|stationary, mass=20..900+,
            launch_year=1970..2024)""",
    "research": """
        paper(id, title=@title, conference_id, topic=vision|speech|robotics,
            impact=0..900+, year=1990..2024)
        conference(id, name=@firm, city=@city, attendance=50..990+)""",
    "cooking": """
        recipe(id, name=Crispy|Creamy|Sweet|Sour|Golden*Soup|Stew|Salad|Curry|Omelette|Rice,
            chef_id, diet=vegan|keto|halal, duration=5..180, yield=1..40+)
        chef(id, name=@person, country=@country, training_year=1970..2020)""",
    "phones": """
        phone(id, model=@code, brand_id, colour=black|white|blue, price=90..990+, battery=20..80)
        brand(id, name=@firm, country=@country, founding_year=1940..2018)""",
    "fishing": """
        boat(id, name=@ship, harbour_id, gear=nets|lines|traps, length=5..60, catch=10..900+)
        harbour(id, name=@city, coast=north|east|west, depth=3..40, capacity=8..300+)""",
    "sculptures": """
        sculptor(id, name=@person, country=@country, birth_year=1880..1990)
        sculpture(id, title=@title, sculptor_id, material=bronze|marble|clay, weight=4..900+,
            year=1910..2024)""",
    "housing": """
        tenant(id, name=@person, tower_id, contract=fixed|open|sublet, rent=300..990+,
            arrival_year=1990..2024)
        tower(id, name=@place, city=@city, height=4..70+)""",
    "charity": """
        donation(id, donor=@person, charity_id, method=cash|card|cheque, amount=5..900+,
            year=1995..2024)
        charity(id, name=@firm, cause=health|wildlife|literacy, staff=5..900+)""",
    "board_games": """
        game(id, title=@title, publisher_id, theme=war|trade|horror,
            rating=1.0..9.9, circulation=10..900+)
        publisher(id, name=@firm, city=@city, founding_year=1920..2018)""",
    "skiing": """
        resort(id, name=@place, country=@country, altitude=900..3600, capacity=2..60+)
        slope(id, name=@ship, resort_id, difficulty=easy|medium|hard, length=200..990+,
            width=8..90)""",
    "laboratory": """
        experiment(id, title=@title, scientist_id, status=planned|running|finished, cost=5..900+,
            starting_year=1998..2024)
        scientist(id, name=@person, field=chemistry|physics|ecology, output=1..300+)""",
    "market": """
        market(id, name=@place, city=@city, opening_year=1850..2015)
        stall(id, code=@code, market_id, goods=fruit|cheese|flowers, rent=10..400+,
            size=2..60)""",
    "podcasts": """
        podcast(id, title=@title, host_id, topic=science|business|travel, output=5..600+,
            starting_year=2004..2024)
        host(id, name=@person, country=@country, audience=10..990+)""",
    "taxi": """
        ride(id, passenger=@person, driver_id, district=airport|downtown|suburb, fare=5..150+,
            distance=1.0..60.0)
        driver(id, name=@person, vehicle=sedan|van|minibus, licence_year=1985..2023)""",
    "beekeeping": """
        hive(id, label=@code, beekeeper_id, site=meadow|orchard|heath, honey=2..90+, capacity=4..40)
        beekeeper(id, name=@person, city=@city, starting_year=1970..2022)""",
    "monasteries": """
        manuscript(id, title=@title, temple_id, script=Latin|Greek|Coptic, length=10..600+,
            copying_year=1000..1500)
        temple(id, name=@place, country=@country, population=4..150+)""",
}

# Suffixes of table names (see `tables.py`); those of the test schemas never occur in training.
_TRAINING_SUFFIXES = """
    Data List Table Log Set File Line Store View Map Base Entry Slot Main Item Block Sheet Pool
    Cache Group Index Stack Page Unit
""".split()
_TEST_SUFFIXES = "Info Tab Record Book Core Array Card Master Node Report Bank Live".split()


def _schemas(texts: dict[str, str], suffixes: Sequence[str]) -> tuple[Schema, ...]:
    """Parses schemas; uses each suffix about equally often."""
    waiting: list[str] = []
    schemas = []
    draw = Draw("suffixes")
    for name, text in texts.items():
        waiting = waiting or draw.shuffled(suffixes)
        schemas.append(parse_schema(name, text, waiting.pop()))
    return tuple(schemas)


TRAINING_SCHEMAS = _schemas(_TRAINING, _TRAINING_SUFFIXES)
TEST_SCHEMAS = _schemas(_TEST, _TEST_SUFFIXES)
SCHEMAS: dict[str, Schema] = {s.name: s for s in TRAINING_SCHEMAS + TEST_SCHEMAS}
